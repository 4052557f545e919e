"""An HTTP server with OpenAI's endpoints over one unified model: `unimm serve`.

`engine.py` owns the model and batches what waits for it; `app.py` joins it to the routes. FastAPI and uvicorn come with
the extra `serve`; importing this package alone imports neither them nor torch.
"""

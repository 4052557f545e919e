"""`unimm serve`: the model behind OpenAI's endpoints."""

import argparse
import importlib.util
from functools import partial
from pathlib import Path

from unimm.commands.options import add_json, add_model
from unimm.commands.shared import load_model
from unimm.config.argument_types import number_from_zero, whole_number
from unimm.errors import UserError
from unimm.runs.report import Report
from unimm.serving.settings import KEYS_VARIABLE, LOOPBACK, EngineSettings, ServingSettings, read_api_keys

_NEEDED = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_server(parser)
    parser.add_argument("--web", action="store_true", help="show the web page, too")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that serves."""
    own, engine = ServingSettings(), EngineSettings()
    add_model(parser)
    add_json(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=whole_number, default=8000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help=f"API keys, one per line (default: those in {KEYS_VARIABLE}, by commas)"
    )
    parser.add_argument("--without-keys", action="store_true", help="serve other machines without an API key")
    parser.add_argument("--name", metavar="NAME", help="the model's name (default: of its folder, or unimm)")
    parser.add_argument(
        "--alias", action="append", default=[], metavar="NAME", help="a name for the model; repeatable (default: any)"
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="whose pages may call; repeatable"
    )
    parser.add_argument(
        "--image-host", action="append", default=[], metavar="HOST", help="images may be fetched from it; repeatable"
    )
    parser.add_argument(
        "--keep-images", type=whole_number, default=0, metavar="N", help="keep the last N images for URLs (default: 0)"
    )
    parser.add_argument("--max-n", type=whole_number, default=own.max_n, metavar="N", help="images of a request")
    parser.add_argument("--max-body", type=whole_number, default=own.max_body, metavar="BYTES", help="of a request")
    parser.add_argument(
        "--queue", type=whole_number, default=engine.queue_size, metavar="N", help="requests that may wait"
    )
    parser.add_argument(
        "--batch-tokens", type=whole_number, default=engine.batch_tokens, metavar="N", help="tokens of a batch"
    )
    parser.add_argument(
        "--batch-wait",
        type=number_from_zero,
        default=engine.batch_wait,
        metavar="S",
        help="seconds to wait for a fuller batch",
    )
    parser.add_argument(
        "--shutdown-seconds", type=whole_number, default=30, metavar="S", help="for what runs when the server stops"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Serve the model with OpenAI's endpoints: chat, images, responses."""
    needed, extra = ((*_NEEDED, "gradio"), "web") if arguments.web else (_NEEDED, "serve")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"Serving needs packages that are not installed ({', '.join(missing)}): pip install unimm[{extra}]."
        )
    keys = read_api_keys(arguments.api_key_file)
    local = arguments.host in LOOPBACK
    if not (local or keys or arguments.without_keys):
        raise UserError(
            f"--host {arguments.host} lets other machines in and there are 0 API keys: give --api-key-file or "
            f"{KEYS_VARIABLE}, or --without-keys to serve everyone."
        )
    if not 0 < arguments.port < 65_536:
        raise UserError(f"--port {arguments.port} is no port: give 1 to 65535.")
    settings = ServingSettings(
        model_name=arguments.name or (Path(arguments.model).name if arguments.model else "") or "unimm",
        aliases=tuple(arguments.alias),
        api_keys=keys,
        allowed_hosts=LOOPBACK if local else (),
        cors_origins=tuple(arguments.cors_origin),
        image_hosts=tuple(host.lower() for host in arguments.image_host),
        max_n=arguments.max_n,
        max_body=arguments.max_body,
        kept_images=arguments.keep_images,
    )
    engine_settings = EngineSettings(
        queue_size=arguments.queue, batch_tokens=arguments.batch_tokens, batch_wait=arguments.batch_wait
    )
    from unimm.serving.run import run_server

    extend = None
    if arguments.web:
        from unimm.serving.web import mount_page

        extend = partial(mount_page, knows_shapes=arguments.model is None)
    run_server(
        partial(load_model, arguments.model, report),
        settings,
        engine_settings,
        host=arguments.host,
        port=arguments.port,
        shutdown_seconds=arguments.shutdown_seconds,
        extend=extend,
    )
    report.add(host=arguments.host, port=arguments.port)

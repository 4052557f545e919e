"""`ClassConditionalTrainer`: a `StreamTrainer` for class-conditional image generation on pre-extracted ids."""

from typing import Any

from unimm.class_conditional.ids import IdRows, IdStream
from unimm.class_conditional.modeling import ClassConditionalGPT
from unimm.training.loop.arguments import C2ITrainingArguments
from unimm.training.loop.stream_trainer import StreamTrainer
from unimm.training.loop.throughput import TransformerCost, Work


class ClassConditionalTrainer(StreamTrainer):
    """Train the GPT on a stream of ids.

    Args:
        model: the GPT.
        args: training settings.
        train_dataset, eval_dataset: the training stream, and the held-out rows.
    """

    def __init__(
        self,
        model: ClassConditionalGPT,
        args: C2ITrainingArguments,
        *,
        train_dataset: IdStream,
        eval_dataset: IdRows,
    ) -> None:
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, stream_seed=train_dataset.seed
        )

    def work_of(self, inputs: Any) -> Work:
        """Return the work of a batch; an image's input is its class and all ids but the last, so as long as its ids."""
        config, (rows, length) = self.model.config, inputs["ids"].shape
        cost = TransformerCost.of(self.model, config.num_hidden_layers, config.hidden_size)
        return Work(rows, rows * length, float(cost.training(rows * length, length)))

    def held_out_loss(self) -> float:
        """Return the mean cross entropy of the held-out ids, in nats per id."""
        return self.evaluate()["eval_loss"]

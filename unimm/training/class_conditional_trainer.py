"""`ClassConditionalTrainer`: a `StreamTrainer` over pre-extracted ids."""

from unimm.class_conditional.ids import IdRows, IdStream
from unimm.class_conditional.modeling import ClassConditionalGPT
from unimm.training.arguments import HostTrainingArguments
from unimm.training.stream_trainer import StreamTrainer


class ClassConditionalTrainer(StreamTrainer):
    """Train the GPT on a stream of ids.

    Args:
        model: the GPT.
        args: settings.
        train_dataset, eval_dataset: the stream, and the held-out rows.
    """

    def __init__(
        self, model: ClassConditionalGPT, args: HostTrainingArguments, *, train_dataset: IdStream, eval_dataset: IdRows
    ) -> None:
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, stream_seed=train_dataset.seed
        )

    def held_out_loss(self) -> float:
        """The mean cross entropy of the held-out ids, in nats an id."""
        return self.evaluate()["eval_loss"]

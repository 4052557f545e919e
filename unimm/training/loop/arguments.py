"""Training settings: subclasses of `TrainingArguments` for `Trainer`, and a config for the tokenizers' own loop."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from transformers import TrainingArguments

from unimm.bfloat16 import Precision, automatic_dtype, training_device
from unimm.config.schema import Count, Decay, Natural, NonNegative, Range, Rate, Seed, Share, used_when
from unimm.errors import UserError
from unimm.sampling import GuidanceScale, ImageSampling


def _no_gpu() -> bool:
    return not torch.cuda.is_available()


def accumulation_steps(global_batch_size: int, batch_size: int, processes: int) -> int:
    """Return the accumulation steps for `global_batch_size` with `processes` times `batch_size` samples at a time.
    Raises UserError if they do not divide it."""
    steps, rest = divmod(global_batch_size, batch_size * processes)
    if rest or not steps:
        raise UserError(
            f"train.global_batch_size is {global_batch_size}, and {processes} processes with a batch of {batch_size} "
            f"take {batch_size * processes} samples at a time, which does not divide it: change the batch per process "
            "or the number of processes."
        )
    return steps


@dataclass
class StreamTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for an endless, seeded stream of samples.

    Samples are taken in order (the stream is shuffled by construction), non-finite losses are not filtered from the
    log, and DDP does not search for unused parameters: every batch reaches all trainable parameters.

    Args:
        ema_decay: decay of the averaged weights, which are evaluated and saved; None: no averaging.
        global_batch_size: samples of one optimizer step; `gradient_accumulation_steps` follows from it and the number
            of processes. None keeps the given `gradient_accumulation_steps`.
        bf16: "auto", the default, is True if the device has fast bfloat16 matrix products, else False.
    """

    RANGES: ClassVar[dict[str, Range]] = {
        "per_device_train_batch_size": Range(least=1),
        "per_device_eval_batch_size": Range(least=1),
        "gradient_accumulation_steps": Range(least=1),
        "learning_rate": Range(above=0),
        "weight_decay": Range(least=0),
        "adam_beta1": Range(least=0, below=1),
        "adam_beta2": Range(least=0, below=1),
        "adam_epsilon": Range(above=0),
        "max_grad_norm": Range(least=0),
        "warmup_steps": Range(least=0),
        "logging_steps": Range(above=0),
        "eval_steps": Range(above=0),
        "eval_delay": Range(least=0),
        "save_steps": Range(above=0),
        "seed": Range(least=0, most=2**32 - 1),
        "data_seed": Range(least=0, most=2**32 - 1),
        "dataloader_num_workers": Range(least=0),
        "dataloader_prefetch_factor": Range(least=1),
        "torch_empty_cache_steps": Range(least=1),
        "ddp_bucket_cap_mb": Range(least=1),
        "ddp_timeout": Range(least=1),
    }

    UNUSED: ClassVar[frozenset[str]] = frozenset({
        "do_train", "do_eval", "do_predict", "num_train_epochs", "resume_from_checkpoint",  # of scripts, not of Trainer
        "data_seed", "length_column_name", "ignore_data_skip",  # the stream is addressed by position
        "auto_find_batch_size",  # the samples of a step are fixed
        "label_smoothing_factor", "label_names", "average_tokens_across_devices",  # the losses are the trainers' own
        "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches",
        "eval_accumulation_steps", "eval_use_gather_object",  # an evaluation is a loss
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better",  # the last model is the result
    })  # fmt: skip
    """Fields of `TrainingArguments` that have no effect here: a recipe refuses them."""

    bf16: bool | Literal["auto"] = field(default="auto", metadata={"help": "bfloat16; auto: where it is fast."})
    ema_decay: Decay | None = field(default=None, metadata={"help": "Decay of the averaged weights; None: no average."})
    global_batch_size: Count | None = field(default=None, metadata={"help": "Samples of one step of all processes."})
    max_steps: Count = field(default=0, metadata={"help": "Optimizer steps; needed, a stream has no end."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Samples are messages, not columns."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Only sequential: the step is the position."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Keep losses that are not finite in the log."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for unused parameters (DDP)."}
    )
    use_cpu: bool = field(default_factory=_no_gpu, metadata={"help": "Train on the CPU."})
    dataloader_pin_memory: bool = field(default_factory=lambda: not _no_gpu(), metadata={"help": "Pin memory."})
    accelerator_config: dict | str | None = field(
        default_factory=lambda: None if _no_gpu() else {"non_blocking": True},
        metadata={"help": "Of accelerate; on a GPU batches are copied while it works."},
    )
    save_total_limit: Count | None = field(default=1, metadata={"help": "Checkpoints that are kept."})

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise UserError(
                f"train.max_steps must be at least 1, got {self.max_steps}: a stream of samples has no end of its own."
            )
        if self.train_sampling_strategy != "sequential":
            raise UserError(
                f"train.train_sampling_strategy must be 'sequential', got {self.train_sampling_strategy!r}."
            )
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(
                f"train.save_total_limit must be at least 1, or null to keep all; got {self.save_total_limit}."
            )
        automatic, device = self.bf16 == "auto", training_device(self.use_cpu)
        if automatic:
            self.bf16 = not self.fp16 and automatic_dtype(device) == torch.bfloat16
        given = "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"
        self.precision = Precision(given, automatic and not self.fp16, device)
        super().__post_init__()
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = accumulation_steps(
                self.global_batch_size, self.train_batch_size, self.world_size
            )

    @property
    def samples_per_step(self) -> int:
        """Return the samples of one optimizer step, over all processes and accumulation steps."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass
class HostTrainingArguments(StreamTrainingArguments):
    """Settings for training a host, the language model that an image tokenizer is attached to.

    Args:
        use_muon: Muon instead of AdamW for the matrices of the language model's blocks, at the same learning rate.
        max_length: truncate conversations to so many tokens; None: no truncation (`unimm.data.text.truncation`).
        projector_learning_rate: learning rate of the projector, if it differs from `learning_rate`.
        new_rows_warmup_steps: first steps, in which only the embedding rows of the image ids and markers are trained.
        pack_length: tokens of a row into which several images or texts are packed; None pads every sample to its own
            row.
        compile_blocks: torch.compile for the language model's blocks, one compilation for all of them and every
            length; evaluation and image generation stay eager.
    """

    use_muon: bool = field(default=False, metadata={"help": "Muon for the matrices of the blocks, AdamW elsewhere."})
    max_length: Count | None = field(default=None, metadata={"help": "Cut conversations after so many tokens."})
    pack_length: Count | None = field(default=None, metadata={"help": "Tokens of a row of several samples; None: pad."})
    projector_learning_rate: NonNegative | None = field(default=None, metadata={"help": "Of the projector alone."})
    new_rows_warmup_steps: Natural = field(default=0, metadata={"help": "First steps of the new rows alone."})
    compile_blocks: bool = field(default=False, metadata={"help": "Compile the language model's blocks."})


@dataclass
class C2ITrainingArguments(StreamTrainingArguments):
    """Settings for training a class-conditional model.

    Args:
        compile_blocks: torch.compile for the model's blocks; evaluation and image generation stay eager.
    """

    compile_blocks: bool = field(default=False, metadata={"help": "Compile the model's blocks."})


_PANEL = used_when(lambda c: c.prompts, "panel.prompts")


@dataclass(frozen=True)
class PanelSampling(ImageSampling):
    """`ImageSampling` with guidance."""

    guidance_scale: Annotated[GuidanceScale, Range(least=0)] = 3.0


@dataclass
class PanelConfig:
    """Sample images logged to tensorboard at every evaluation, made with the same `generate` that users call.

    Args:
        prompts: text prompts, one image each; empty: no panel.
        sampling: the settings, whatever the checkpoint's own are.
        seed: as in `generate`.
    """

    FORMER: ClassVar[dict[str, str]] = {name: f"sampling.{name}" for name in ("guidance_scale", "temperature")}

    prompts: list[str] = field(default_factory=list)
    sampling: PanelSampling = field(default_factory=PanelSampling, metadata=_PANEL)
    seed: Seed = field(default=0, metadata=_PANEL)


_FITS = used_when(
    lambda c: c.codebook_init == "data" or c.reestimation_rounds, "train.codebook_init data or reestimation_rounds"
)
_RESTARTS = used_when(lambda c: c.restart_steps, "train.restart_steps")


@dataclass
class TokenizerTrainingConfig:
    """Settings of one stage of tokenizer training; the defaults are VQRAE's table 7 for SigLIP2-256.

    `batch_size` is per process; `gradient_accumulation_steps` follows from `global_batch_size` if that is set.

    `codebook_init` "data" initializes the codebook at the k-means centers of the latents (ours; "random" is the
    paper's). Every `restart_steps` steps (ours too; None: never), up to the share `restart_until` of the run, dead
    codes, unused since the last restart, move to poorly quantized latents; with `restart_redundant` so do codes that a
    more frequent neighbor can replace (`redundant_codes`). After the last step, `reestimation_rounds` rounds of
    `reestimate_codes` spread the codes, each on `codebook_init_images` images, with everything else fixed.

    In stage 2 the encoder trains at `encoder_learning_rate`. Stage 3, ours, trains the decoder alone: ids and features
    do not change, so it can follow the training of a language model. The learning rate of every group ends at min(its
    rate, `end_learning_rate`). `mixed_precision` "auto" is bf16 if the device has fast bfloat16 matrix products, else
    "no". `tf32` lets GPUs that have it round products that stay in float32, those of perceptual networks, to TF32; the
    search for the nearest codes does not.
    """

    FORMER: ClassVar[dict[str, str]] = {
        "codebook_init_pictures": "codebook_init_images",
        "revive_steps": "restart_steps",
        "revive_until": "restart_until",
        "revive_redundant": "restart_redundant",
        "refit_rounds": "reestimation_rounds",
    }

    output_dir: str
    stage: Literal[1, 2, 3] = 1
    steps: Count = 100_000
    batch_size: Count = 64
    global_batch_size: Count | None = None
    gradient_accumulation_steps: Count = 1
    learning_rate: Rate = 4e-4
    encoder_learning_rate: Rate = field(default=1e-5, metadata=used_when(lambda c: c.stage == 2, "train.stage 2"))
    end_learning_rate: NonNegative = 1e-4
    shared_lr_multiplier: bool = field(default=False, metadata=used_when(lambda c: c.stage == 2, "train.stage 2"))
    warmup_steps: Natural = 2000
    betas: list[Decay] = field(default_factory=lambda: [0.9, 0.999])
    adam_epsilon: Rate = 1e-8
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Rate = 1.0
    ema_decay: Decay = 0.999
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    tf32: bool = False
    codebook_init: Literal["random", "data"] = "random"
    codebook_init_images: Count = field(default=2048, metadata=_FITS)
    restart_steps: Count | None = None
    restart_until: Share = field(default=0.7, metadata=_RESTARTS)
    restart_redundant: bool = field(default=False, metadata=_RESTARTS)
    reestimation_rounds: Natural = 0
    seed: Seed = 0
    num_workers: Natural = 0
    log_steps: Count = 50
    panel_steps: Count = 1000
    save_steps: Count = 1000
    keep_last: Count = 1
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "save_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, got {getattr(self, name)}.")
        automatic, device = self.mixed_precision == "auto", training_device()
        if automatic:
            self.mixed_precision = "bf16" if automatic_dtype(device) == torch.bfloat16 else "no"
        given = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[self.mixed_precision]
        self.precision = Precision(given, automatic, device)

"""Settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlbench.config.checks import RefusedSetting, check_choice, check_range

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon", "galore", "galore_8bit")
_PAGED = "paged_"


@dataclass
class GaloreConfig:
    """optim.name=galore or galore_8bit; not read by others."""

    rank: int = 128  # of the subspace; matrices with a side that is not longer are AdamW's as they are
    interval: int = 50  # updates until the subspace is that of the latest gradient again
    # likeness of a new subspace to the old one, 0 by chance, 1 if equal, from which the interval doubles; null: never
    threshold: float | None = 0.4
    scale: float = 1.0  # of the updates; at 1 they are no larger than AdamW's at the same lr

    def __post_init__(self) -> None:
        check_range("optim.galore.rank", self.rank, low=1)
        check_range("optim.galore.interval", self.interval, low=1)
        check_range("optim.galore.threshold", self.threshold, low=0, high=1)
        check_range("optim.galore.scale", self.scale, low=0, is_low_open=True)


@dataclass
class OptimConfig:
    # adamw | adamw_8bit: moments of matrices from 4,096 numbers on in 8 bits (bitsandbytes) | paged_adamw,
    # paged_adamw_8bit: on a GPU, bitsandbytes'; the driver moves moments of tensors from 100,000 numbers on to host
    # memory while the GPU is full | muon: of matrices torch's Muon with updates of AdamW's size, AdamW of norms,
    # biases, embeddings and the head | galore, galore_8bit: of such matrices AdamW, or that of 8 bits, in a low-rank
    # subspace of their gradients
    name: str = "adamw"
    # the highest learning rate, reached after the warm-up; null: derived from training.parameters and stage
    lr: float | None = None
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.99  # decay of the second moment
    galore: GaloreConfig = field(default_factory=GaloreConfig)
    momentum: float | None = None  # optim.name=muon: decay of the matrices' momentum; null: 0.95
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, times lr
    schedule: str = "cosine"  # constant | linear | cosine, after the warm-up
    warmup_steps: int = 2  # lr rises linearly over them
    min_lr_frac: float = 0.1  # the schedule ends at this share of lr
    max_grad_norm: float = 1.0  # 0: no clipping

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZERS)
        if self.momentum is not None and self.name != "muon":
            raise ValueError(
                f"optim.momentum is {self.momentum}, which optim.name={self.name} does not read; expected null, or muon"
            )
        if self.galore != GaloreConfig() and not self.name.startswith("galore"):
            raise RefusedSetting(
                f"optim.galore is set, which optim.name={self.name} does not read; expected its defaults, or galore",
                "optim.galore",
                GaloreConfig(),
            )
        check_range("optim.momentum", self.momentum, low=0, high=1)
        check_choice("optim.schedule", self.schedule, ["constant", "linear", "cosine"])
        check_range("optim.lr", self.lr, low=0, high=float("inf"), is_low_open=True, is_high_open=True)
        check_range("optim.beta1", self.beta1, low=0, high=1)
        check_range("optim.beta2", self.beta2, low=0, high=1)
        check_range("optim.weight_decay", self.weight_decay, low=0)
        check_range("optim.warmup_steps", self.warmup_steps, low=0)
        check_range("optim.min_lr_frac", self.min_lr_frac, low=0, high=1)
        check_range("optim.max_grad_norm", self.max_grad_norm, low=0)

    @property
    def is_paged(self) -> bool:
        """Whether moments of large tensors lie in memory that GPU and host share."""
        return self.name.startswith(_PAGED)


def check_paged(config: OptimConfig, profile: str) -> None:
    """
    Args:
        profile: hardware.profile, cpu or gpu.

    Raises:
        ValueError: paged moments, and no GPU whose driver would page them.
    """
    if config.is_paged and profile != "gpu":
        raise ValueError(
            f"optim.name is {config.name}, whose moments lie in memory that a GPU shares with the host; found "
            f"hardware={profile}; expected a GPU, or optim={config.name.removeprefix(_PAGED)}"
        )

"""Writes the frozen checkpoints beside it with the real packages, which the tests do not need.

    pip install mmengine lightning && python tests/files/make_training_files.py

Run with mmengine 0.10.7 and lightning 2.6.6. The weights are two numbers; what surrounds them is what these packages
leave in every checkpoint.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

HERE = Path(__file__).parent


def write_mmengine() -> None:
    """Saves what mmengine's Runner does: meta, weights, and its message hub with histories of losses."""
    from mmengine.config import ConfigDict
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance("frozen")
    for step in range(3):
        hub.update_scalar("train/loss", torch.tensor(1.0 / (step + 1)))
        hub.update_scalar("train/lr", 1e-4)
    hub.update_info("iter", 3)
    meta = {"iter": 3, "cfg": "model = dict()", "hooks": ConfigDict(interval=1)}
    record = {"meta": meta, "state_dict": {"x": torch.ones(2)}, "message_hub": hub.state_dict()}
    torch.save(record, HERE / "mmengine.pth")


def write_lightning() -> None:
    """Saves a checkpoint of a Trainer whose module keeps its arguments, options and a loss among them."""
    from lightning.pytorch import LightningModule, Trainer

    class Tiny(LightningModule):
        def __init__(self, options: argparse.Namespace, loss: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.x = nn.Parameter(torch.ones(2))

        def training_step(self, batch: Tensor) -> Tensor:
            return (self.x * batch).sum() * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), weight_decay=0.0)

    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    options = argparse.Namespace(data=Path("data"))
    trainer.fit(Tiny(options, nn.MSELoss()), DataLoader(torch.ones(2)))
    trainer.save_checkpoint(HERE / "lightning.ckpt")


if __name__ == "__main__":
    write_mmengine()
    write_lightning()

"""Forget a class of a network that Lightning has trained.

Lightning trains; Letheon is given the network inside the module, and the module its weights back.
Of an architecture that Letheon knows, a checkpoint file of Lightning is read as it is, too:
`letheon.load_model("last.ckpt")`.
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import letheon
from letheon.engine.recipe import Recipe
from letheon.methods.finetune import Finetune


class Classifier(lightning.LightningModule):
    """A network in `model`, as Lightning's own examples have it."""

    def __init__(self) -> None:
        """Build the network."""
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


lightning.seed_everything(0)
labels = torch.arange(600) % 3
images = torch.randn(600, 3, 8, 8) + labels.reshape(-1, 1, 1, 1)
train = TensorDataset(images, labels)

module = Classifier()
trainer = lightning.Trainer(
    max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False,
)  # fmt: skip
trainer.fit(module, DataLoader(train, batch_size=50, shuffle=True))

result = letheon.forget(
    module.model, train=train, forget=[2],
    method=Finetune(Recipe(epochs=5, lr=0.05, batch_size=50)),
)  # fmt: skip
with torch.no_grad():
    before = (module.model(images).argmax(1) == labels).float()
    module.model.load_state_dict(result.model.state_dict())
    after = (module.model.eval()(images).argmax(1) == labels).float()
for name, right in (("before", before), ("after", after)):
    print(f"{name}: class 2 {right[labels == 2].mean():.2f}, ", end="")
    print(f"the others {right[labels != 2].mean():.2f}")

"""Forget two classes with a network, data and training loop of plain PyTorch.

python docs/examples/plain_pytorch.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import letheon
from letheon.engine.recipe import Recipe
from letheon.methods.finetune import Finetune

torch.manual_seed(0)
labels = torch.arange(600) % 3
images = torch.randn(600, 3, 8, 8) + labels.reshape(-1, 1, 1, 1)
train = TensorDataset(images, labels)

net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
for _ in range(5):
    for batch, target in DataLoader(train, batch_size=50, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), target).backward()
        optimizer.step()

result = letheon.forget(
    net, train=train, forget=[2], method=Finetune(Recipe(epochs=5, lr=0.05, batch_size=50))
)
with torch.no_grad():
    for name, network in (("before", net), ("after", result.model)):
        right = network.eval()(images).argmax(1) == labels
        print(f"{name}: class 2 {right[labels == 2].float().mean():.2f},", end=" ")
        print(f"the others {right[labels != 2].float().mean():.2f}")

"""The models that the workbench trains: GPT-2 from nano to XL, and a small MNIST network."""

from hybridlab.models.cnn import MnistCNN
from hybridlab.models.gpt2 import GPT2, GPT2Config

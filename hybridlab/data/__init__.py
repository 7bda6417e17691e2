"""Data, each source named by one string: text as streams of tokens, images as arrays, and their batches."""

from hybridlab.data.image_batches import ImageBatches, ImageData, images_in_order
from hybridlab.data.images import load_images
from hybridlab.data.text import load_text
from hybridlab.data.token_batches import TextData, TokenBatches, evenly_spaced

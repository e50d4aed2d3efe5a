"""Models: where pretrained ones come from, and how they are adapted."""

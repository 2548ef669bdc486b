"""Single files of checkpoints, before anybody asks what their tensors mean."""

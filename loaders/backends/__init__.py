"""The loaders behind `make_loader`: torch, beton, ffcv, dali, resident."""

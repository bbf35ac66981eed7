"""The field's way of forgetting and measuring: a plain model of the published code."""

"""The ground of the stack."""

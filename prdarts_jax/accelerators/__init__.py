"""Programs compiled for GPUs and TPUs that are not here, and what a step of them does."""

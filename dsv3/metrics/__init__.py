"""What a run says about itself, and where it says it."""

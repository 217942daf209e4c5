"""Tables, figures and W&B: what a person looks at after a run."""

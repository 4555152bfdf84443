"""What the files of a model say, whoever wants to know: the model's loader or the planner."""

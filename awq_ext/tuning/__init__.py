"""What is learned end to end once all codes are found: the scales of weight groups, so that the model predicts as in float."""

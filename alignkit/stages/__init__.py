"""Recipe -> plan -> data -> model -> steps -> run folder, one file a stage."""

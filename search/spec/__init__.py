"""What a study and a promotion ask for: files read and checked."""

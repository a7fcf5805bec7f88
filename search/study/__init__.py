"""What a study is in the database and on the disk."""

"""The container image: a Dockerfile, and the commands that build and run it."""

"""What every room stands on: errors, files, the command line, and where the files are that ship with the package."""

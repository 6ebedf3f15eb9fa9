"""Bad input and odd uses: each equals one device or ends in a named error; docs/bad_input.md is their table."""

"""Tests of ringpass."""

"""Tests of the tuners that PEFT does not have."""

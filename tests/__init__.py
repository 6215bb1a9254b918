"""Tests of hcna-ray: unit, contract, integration and acceptance."""

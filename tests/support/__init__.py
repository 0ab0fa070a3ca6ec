"""Shared by several test suites: tiny models, local servers, a raw HTTP client, waiting for conditions."""

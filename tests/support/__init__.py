"""What several suites share: tiny models, local servers, a raw HTTP client, waiting for conditions."""

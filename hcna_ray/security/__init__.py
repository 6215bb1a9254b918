"""Who may do what: API keys today; certificates, audit and the message cipher live here too.

Knows files and digests, neither Ray nor HTTP. Everything secret is mode 0600 in a 0700 directory.
"""

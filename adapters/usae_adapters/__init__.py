"""The adapters that come with usae-probe, found through the entry-point group `usae_probe.adapters`.

A third party's adapter is found in the same way; nothing in `usae_probe` imports this package.
"""

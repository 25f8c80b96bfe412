"""Dynamic-capacity mixture of experts: router, dispatchers, experts, layer, balance."""

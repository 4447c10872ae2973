"""`/authz/verify`: what our verifier says of a request, told to the gateway in front of an API.

`asked` reads what the gateway asks, `gateways` tells gateways from everybody else, and
`endpoint` answers.
"""

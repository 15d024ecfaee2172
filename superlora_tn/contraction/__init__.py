"""How a graph is contracted: profile, memory order, path, price, route, sharing. No torch; alone imports opt_einsum."""

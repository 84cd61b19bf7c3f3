// Catch2, compiled once for all tests, and the `main` of each.

#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>

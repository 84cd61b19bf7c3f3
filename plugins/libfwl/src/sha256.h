// SHA-256 (FIPS 180-4). Written here because a cryptographic library would be the only library that
// programs have to ship beside libfwl.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace fwl::internal {

class Sha256 {
public:
  void update(const void* data, size_t size);
  // Returns the hash as 64 hexadecimal digits. May be called once, at the end.
  std::string hex();

private:
  void block(const unsigned char* data);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> rest_{};
  size_t rest_size_ = 0;
  uint64_t size_ = 0;
};

} // namespace fwl::internal

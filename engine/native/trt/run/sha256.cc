#include "sha256.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mosear::run {
namespace {

constexpr size_t kBlock = 64;

// The first 32 bits of the fractional part of a root of the n-th prime: the standard's constants.
std::vector<uint32_t> Constants(int count, bool cube) {
  std::vector<uint32_t> found;
  for (int number = 2; static_cast<int>(found.size()) < count; ++number) {
    bool prime = true;
    for (int d = 2; d * d <= number; ++d) prime = prime && number % d != 0;
    if (!prime) continue;
    const long double root = cube ? cbrtl(number) : sqrtl(number);
    found.push_back(static_cast<uint32_t>((root - floorl(root)) * 4294967296.0L));
  }
  return found;
}

uint32_t Turn(uint32_t value, int bits) { return value >> bits | value << (32 - bits); }

void Add(const unsigned char* block, const std::vector<uint32_t>& constants, std::vector<uint32_t>& state) {
  std::array<uint32_t, 64> w{};
  for (size_t i = 0; i < 16; ++i) {
    w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 | uint32_t{block[4 * i + 2]} << 8 |
           block[4 * i + 3];
  }
  for (size_t i = 16; i < 64; ++i) {
    const uint32_t s0 = Turn(w[i - 15], 7) ^ Turn(w[i - 15], 18) ^ w[i - 15] >> 3;
    const uint32_t s1 = Turn(w[i - 2], 17) ^ Turn(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  std::vector<uint32_t> v = state;
  for (size_t i = 0; i < 64; ++i) {
    const uint32_t s1 = Turn(v[4], 6) ^ Turn(v[4], 11) ^ Turn(v[4], 25);
    const uint32_t one = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + constants[i] + w[i];
    const uint32_t s0 = Turn(v[0], 2) ^ Turn(v[0], 13) ^ Turn(v[0], 22);
    const uint32_t two = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
    v = {one + two, v[0], v[1], v[2], v[3] + one, v[4], v[5], v[6]};
  }
  for (size_t i = 0; i < 8; ++i) state[i] += v[i];
}

}  // namespace

std::string Sha256(std::istream& stream) {
  const std::vector<uint32_t> constants = Constants(64, true);
  std::vector<uint32_t> state = Constants(8, false);
  std::array<unsigned char, kBlock> block{};
  uint64_t bytes = 0;
  size_t held = 0;
  while (true) {
    stream.read(reinterpret_cast<char*>(block.data()), kBlock);
    held = static_cast<size_t>(stream.gcount());
    bytes += held;
    if (held < kBlock) break;
    Add(block.data(), constants, state);
  }
  block[held++] = 0x80;
  if (held > kBlock - 8) {
    for (size_t i = held; i < kBlock; ++i) block[i] = 0;
    Add(block.data(), constants, state);
    held = 0;
  }
  for (size_t i = held; i < kBlock - 8; ++i) block[i] = 0;
  for (size_t i = 0; i < 8; ++i) block[kBlock - 1 - i] = static_cast<unsigned char>(bytes * 8 >> 8 * i);
  Add(block.data(), constants, state);
  std::string text;
  for (uint32_t word : state) {
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 0xf];
  }
  return text;
}

}  // namespace mosear::run

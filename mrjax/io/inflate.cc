// Inflate zlib streams (RFC 1950 and 1951) of noise, which are nearly all literals; undo HDF5's shuffle filter.
//
// Where a code word begins is known once the word before it is decoded, so a processor mostly waits. Here five cursors
// decode five parts of a block, a word each in turn, and their waits overlap. Where the first word of a part begins is
// not known, but words decoded from any bit on soon fall into step with the true ones, in noise after about twenty:
// those before are dropped (`inflate_block`). Cursors write into memory of their own, which `Output::append` copies to
// the output.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

namespace {

constexpr int kCursors = 5, kGroup = 6, kTableBits = 10;  // a group of words seldom has more bits than one load
constexpr uint32_t kRoom = 1 << 14, kEnd = 256, kLongestMatch = 258;
// In bits: the least that the cursors share, the most that a cursor has room for, and zlib's usual block of noise.
constexpr uint64_t kSmallBlock = 8192, kLargestPart = 2 * kRoom, kUsualBlock = 8 * 15200;
constexpr uint64_t kBitsPerMatch = 300;  // data with fewer are no noise, and faster done by libdeflate

// A Huffman code, with a table by the next bits. The entry of a symbol below 256 holds the length of its word in bits 0
// to 5, and the symbol in bits 8 to 15. Others hold 63, from bit 6 on the length, 0 if the word is longer than the
// table's bits or does not exist, and from bit 10 on the symbol less 256.
template <int kBits>
struct Code {
  static constexpr uint32_t kSize = 1 << kBits, kOther = 63;
  static constexpr std::array<uint16_t, kSize> kReversed = [] {
    std::array<uint16_t, kSize> reversed{};
    for (uint32_t i = 1; i < kSize; ++i) reversed[i] = reversed[i / 2] / 2 | (i & 1) << (kBits - 1);
    return reversed;
  }();
  uint16_t table[kSize], count[16], symbols[288];

  struct Word {
    uint32_t length, symbol;
  };

  bool build(const uint8_t* lengths, int n, bool complete) {
    // Four parts of the symbols are counted and sorted side by side: a number that was just stored is slow to load.
    const int part = (n + 3) / 4;
    uint16_t place[4][16] = {};
    for (int i = 0; i < part; ++i)
      for (int k = 0; k < 4 && k * part + i < n; ++k) ++place[k][lengths[k * part + i]];
    int left = 1 << 15, longest = 0, sum = 0;
    for (int length = 1; length <= 16; ++length) {  // symbols without a word come last
      int before = sum;
      for (auto& counts : place) sum += std::exchange(counts[length % 16], sum);
      if (length == 16) break;
      count[length] = sum - before;
      left -= count[length] << (15 - length);
      if (count[length]) longest = length;
    }
    if (left < 0 || (left && (complete || longest > 1))) return false;  // as zlib does
    for (int i = 0; i < part; ++i)
      for (int k = 0; k < 4 && k * part + i < n; ++k) symbols[place[k][lengths[k * part + i]]++] = k * part + i;
    const uint16_t* symbol = symbols;
    uint32_t word = 0;  // its first bit is the highest
    table[0] = kOther;
    for (int length = 1; length <= kBits; ++length) {
      std::copy_n(table, 1 << (length - 1), table + (1 << (length - 1)));
      for (int i = 0; i < count[length]; ++i, ++symbol, word += kSize >> length)
        table[kReversed[word]] = *symbol < 256 ? length | *symbol << 8 : kOther | length << 6 | (*symbol - 256) << 10;
    }
    return true;
  }

  // Return the word that the bits begin with; its length is 0 if there is none.
  Word decode(uint64_t bits) const {
    uint32_t entry = table[bits & (kSize - 1)], length = entry >> 6 & 15;
    if ((entry & 63) != kOther) return {entry & 63, entry >> 8};
    if (length) return {length, 256 + (entry >> 10)};
    int word = 0, first = 0, index = 0;
    for (length = 1; length < 16; ++length, bits >>= 1) {
      word = word << 1 | (bits & 1), first <<= 1;
      if (word - first < count[length]) return {length, symbols[index + word - first]};
      index += count[length], first += count[length];
    }
    return {0, 0};
  }
};

struct Codes {
  Code<kTableBits> symbols;
  Code<7> lengths, distances;  // lengths: of the other two codes
};

// Return the bits at a position, at least 57.
uint64_t peek(const uint8_t* in, uint64_t position) {
  uint64_t bits;
  std::memcpy(&bits, in + position / 8, 8);
  return bits >> position % 8;
}

// A literal (length 1, distance 0), a match, the end of the block (length 0), or nothing valid (no bits).
struct Token {
  uint32_t bits;
  uint16_t length, distance;
  uint8_t literal;
};

// Decode the rest of a match whose first symbol has taken the first `used` bits.
__attribute__((noinline)) Token decode_match(const Codes& codes, uint64_t bits, uint32_t used, uint32_t symbol) {
  if (symbol == kEnd) return {used, 0, 0, 0};
  if ((symbol -= 257) > 28) return {};
  // Eight lengths have no extra bits, then four have 1, four 2, ...; four distances have none, then two 1, two 2, ...
  uint32_t extra = symbol < 8 ? 0 : symbol / 4 - 1;
  uint32_t length = 3 + (symbol < 8 ? symbol : (4 + symbol % 4) << extra);
  if (symbol == 28) extra = 0, length = kLongestMatch;
  bits >>= used, length += bits & ((1 << extra) - 1);
  bits >>= extra, used += extra;
  auto [more, step] = codes.distances.decode(bits);
  if (more == 0 || step > 29) return {};
  bits >>= more, used += more;
  extra = step < 2 ? 0 : step / 2 - 1;
  uint32_t distance = 1 + (step < 2 ? step : (2 + step % 2) << extra) + (bits & ((1 << extra) - 1));
  return {used + extra, static_cast<uint16_t>(length), static_cast<uint16_t>(distance), 0};
}

inline Token decode_token(const Codes& codes, uint64_t bits) {
  auto [used, symbol] = codes.symbols.decode(bits);
  if (symbol >= 256) return decode_match(codes, bits, used, symbol);
  return {used, used > 0, 0, static_cast<uint8_t>(symbol)};
}

struct Match {
  uint32_t start;
  uint16_t length, distance;
};

// What is decoded from `start` up to `position`, both in bits. Matches leave gaps in the data, which are in reverse.
struct Cursor {
  uint64_t start, position;
  uint32_t size, matches;
  enum { kGoing, kEnded, kDamaged } state;
  uint8_t data[kRoom + 2 * kLongestMatch];
  Match match[kRoom / 3 + 2];

  void begin(uint64_t at) { start = position = at, size = matches = 0, state = kGoing; }
  uint8_t* at(uint32_t i) { return data + sizeof data - 1 - i; }
  bool going() const { return state == kGoing && size < kRoom; }
  void step(const uint8_t* in, const Codes& codes) {
    Token token = decode_token(codes, peek(in, position));
    if (token.length == 0) state = token.bits ? kEnded : kDamaged;
    if (token.distance) match[matches++] = {size, token.length, token.distance};
    else *at(size) = token.literal;
    position += token.bits, size += token.length;
  }
  __attribute__((noinline)) void step_to_match(const uint8_t* in, const Codes& codes, bool guessed) {
    uint64_t bits = peek(in, position);
    uint32_t used = 0, literals = 0;
    for (; literals < kGroup && used <= 57 - 15; ++literals) {
      auto [more, symbol] = codes.symbols.decode(bits >> used);
      if (more == 0 || symbol >= 256) break;
      used += more, *at(size + literals) = symbol;
    }
    position += used, size += literals;
    if (literals < kGroup) step(in, codes);
    // The end of a block this early after a guessed start is most likely none, but codes out of step.
    if (guessed && state != kGoing && size < 128) begin(position + 1);
  }
};

// Decode with n cursors until one of them reaches its limit, its end, or the end of its room.
template <int n>
__attribute__((noinline)) void run(Cursor* cursors, const uint64_t* limits, const uint8_t* in, const Codes& codes) {
  uint64_t position[n];
  uint8_t* to[n];
  uint64_t groups;  // that neither reach a limit nor lack room
  auto step_to_match = [&](int k) __attribute__((always_inline)) {
    Cursor& c = cursors[k];
    c.position = position[k], c.size = c.at(0) - to[k];
    c.step_to_match(in, codes, k > 0);
    position[k] = c.position, to[k] = c.at(c.size);
    if (!c.going() || c.position + 64 * groups > limits[k] || c.size + 8 * groups > kRoom) groups = 1;
  };
  // The bit before the first makes the masked bits an offset in bytes. The highest bit tells how far the bits were
  // moved: out, by an entry that is no literal's, or further than the 56 that a load surely holds after that bit.
  // An entry is stored whole, its length where the next literal comes: one load serves both.
  auto decode_group = [&]() __attribute__((always_inline)) {
    uint64_t bits[n];
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) bits[k] = peek(in, position[k] - 1) | uint64_t{1} << 63;
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
        uint16_t entry;
        uint64_t offset = bits[k] & 2 * ((1 << kTableBits) - 1);
        std::memcpy(&entry, reinterpret_cast<const uint8_t*>(codes.symbols.table) + offset, 2);
        bits[k] >>= entry & 63;
        std::memcpy(to[k] - i - 1, &entry, 2);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      if (__builtin_expect(bits[k] >> 7 != 0, 1)) position[k] += __builtin_clzll(bits[k]), to[k] -= kGroup;
      else step_to_match(k);
    }
  };
  for (;;) {
    groups = kRoom;
    for (int k = 0; k < n; ++k) {
      Cursor& c = cursors[k];
      if (!c.going() || c.position >= limits[k]) return;
      position[k] = c.position, to[k] = c.at(c.size);
      groups = std::min({groups, (limits[k] - c.position) / 64 + 1, uint64_t{kRoom - c.size} / 8 + 1});
    }
    for (; groups; --groups) decode_group();
    for (int k = 0; k < n; ++k) cursors[k].position = position[k], cursors[k].size = cursors[k].at(0) - to[k];
  }
}

struct Output {
  uint8_t* data;
  size_t size, capacity;
  uint64_t matches;  // of this block

  // Append what a cursor holds after its first `skip` bytes and `match` matches; false if it does not fit.
  bool append(Cursor& c, uint32_t skip, uint32_t match) {
    if (c.size - skip > capacity - size) return false;
    std::reverse_copy(c.at(c.size) + 1, c.at(skip) + 1, data + size);
    for (uint32_t i = match; i < c.matches; ++i) {
      auto [start, length, distance] = c.match[i];
      uint8_t* to = data + size + (start - skip);
      if (distance > to - data) return false;
      if (distance >= length) std::memcpy(to, to - distance, length);
      else if (distance == 1) std::memset(to, to[-1], length);
      else for (uint8_t* end = to + length; to < end; ++to) *to = *(to - distance);
    }
    size += c.size - skip, matches += c.matches - match;
    return true;
  }
};

struct Memory {
  Codes codes;
  Cursor cursors[kCursors];
};

// Inflate a block, about `guess` bits long, to its end.
bool inflate_block(const uint8_t* in, uint64_t end, uint64_t& position, uint64_t guess, Memory& memory, Output& out) {
  auto& [codes, cursors] = memory;
  const uint64_t start = position;
  out.matches = 0;
  for (uint64_t stop = position + guess; position < end;) {
    // If the guess is too low, look for the end of the block alone before another guess.
    bool alone = std::min(stop, end) < position + kSmallBlock;
    uint64_t part = alone ? kSmallBlock : std::min((std::min(stop, end) - position) / kCursors, kLargestPart);
    if (alone) stop = position + kSmallBlock + guess;
    int count = alone ? 1 : kCursors;
    uint64_t limits[kCursors];
    for (int k = 0; k < count; ++k) {
      cursors[k].begin(position + k * part);
      limits[k] = std::min(end, position + (k + 1) * part);
    }
    if (!alone) run<kCursors>(cursors, limits, in, codes);
    for (int k = 0; k < count; ++k) run<1>(cursors + k, limits + k, in, codes);
    // Each cursor goes on until the next one, decoded again from its start, is in step with it.
    uint32_t skip = 0, skipped = 0;
    for (Cursor* c = cursors;; ++c) {
      bool more = c + 1 < cursors + count && c->going() && c->position < end;
      uint64_t next = more ? c[1].start : 0;
      uint32_t bytes = 0, matches = 0;
      while (more && c->position != next) {
        if (c->position < next) {
          c->step(in, codes);
          more = c->going() && c->position < end;
        } else {
          Token token = decode_token(codes, peek(in, next));
          next += token.bits, bytes += token.length, matches += token.distance > 0;
          more = next <= c[1].position && token.length;
        }
      }
      if (!out.append(*c, skip, skipped) || c->state == Cursor::kDamaged) return false;
      position = c->position;
      if (out.matches * kBitsPerMatch > position - start + kSmallBlock) return false;
      if (c->state == Cursor::kEnded) return true;
      if (!more) break;
      skip = bytes, skipped = matches;
    }
  }
  return false;
}

bool read_codes(const uint8_t* in, uint64_t end, uint64_t& position, Codes& codes) {
  static const uint8_t kOrder[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  uint64_t bits = peek(in, position);
  int symbols = 257 + (bits & 31), distances = 1 + (bits >> 5 & 31), orders = 4 + (bits >> 10 & 15);
  uint8_t lengths[320] = {0};
  position += 14;
  for (int i = 0; i < orders && position < end; ++i, position += 3) lengths[kOrder[i]] = peek(in, position) & 7;
  if (symbols > 286 || distances > 30 || !codes.lengths.build(lengths, 19, true)) return false;
  for (int i = 0; i < symbols + distances;) {
    if (position >= end) return false;
    bits = peek(in, position);
    for (int words = 0; words < 4 && i < symbols + distances; ++words) {  // of at most 14 bits, with the repeat's
      auto [used, symbol] = codes.lengths.decode(bits);
      uint32_t repeat = 1, value = symbol;
      if (used == 0 || (symbol == 16 && i == 0)) return false;
      if (symbol > 15) {
        uint32_t extra = symbol == 16 ? 2 : symbol == 17 ? 3 : 7;
        value = symbol == 16 ? lengths[i - 1] : 0;
        repeat = (symbol == 18 ? 11 : 3) + (bits >> used & ((1 << extra) - 1));
        used += extra;
      }
      bits >>= used, position += used;
      if (repeat > static_cast<uint32_t>(symbols + distances - i)) return false;
      lengths[i++] = value;  // most often alone, which is not worth a call of memset
      while (--repeat) lengths[i++] = value;
    }
  }
  return lengths[kEnd] && codes.symbols.build(lengths, symbols, false) &&
         codes.distances.build(lengths + symbols, distances, false);
}

void fixed_codes(Codes& codes) {
  uint8_t lengths[288];
  for (int i = 0; i < 288; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
  codes.symbols.build(lengths, 288, true);
  std::fill(lengths, lengths + 32, 5);
  codes.distances.build(lengths, 32, true);
}

template <size_t kItemSize>
void unshuffle(const uint8_t* __restrict in, uint8_t* __restrict out, size_t items) {
  for (size_t i = 0; i < items; ++i)
    for (size_t byte = 0; byte < kItemSize; ++byte) out[kItemSize * i + byte] = in[items * byte + i];
}

}  // namespace

// Inflate a stream of `size` bytes, after which 16 more can be read, to exactly `capacity` bytes. Return whether that
// worked: damaged streams, and data that are no noise, are left to the caller, as is the checksum.
extern "C" bool mrjax_inflate(const uint8_t* in, size_t size, uint8_t* data, size_t capacity) {
  static thread_local const std::unique_ptr<Memory> memory(new (std::nothrow) Memory);
  if (!memory || size < 6) return false;
  if ((in[0] & 15) != 8 || in[0] >> 4 > 7 || in[1] & 32 || (in[0] << 8 | in[1]) % 31) return false;
  Output out{data, 0, capacity, 0};
  uint64_t end = 8 * (static_cast<uint64_t>(size) - 4), position = 16, guess = kUsualBlock;
  for (bool last = false; !last;) {
    if (position >= end) return false;
    uint64_t start = position, bits = peek(in, position), type = bits >> 1 & 3;
    last = bits & 1, position += 3;
    if (type == 0) {
      position = (position + 7) / 8 * 8, bits = peek(in, position), position += 32;
      uint64_t n = bits & 0xffff;
      if (n != (~bits >> 16 & 0xffff) || position + 8 * n > end || n > capacity - out.size) return false;
      std::memcpy(data + out.size, in + position / 8, n);
      out.size += n, position += 8 * n;
      continue;
    }
    if (type == 1) fixed_codes(memory->codes);
    else if (type == 3 || !read_codes(in, end, position, memory->codes)) return false;
    if (!inflate_block(in, end, position, guess, *memory, out)) return false;
    guess = position - start;
  }
  return out.size == capacity && position <= end && position + 8 > end;
}

// Undo HDF5's shuffle filter: from all first bytes, then all second ones, and so on, to items. Return false for items of
// a size that no number has.
extern "C" bool mrjax_unshuffle(const uint8_t* in, uint8_t* out, size_t items, size_t item_size) {
  switch (item_size) {
    case 2: unshuffle<2>(in, out, items); return true;
    case 4: unshuffle<4>(in, out, items); return true;
    case 8: unshuffle<8>(in, out, items); return true;
    case 16: unshuffle<16>(in, out, items); return true;
    default: return false;
  }
}

#include "cuda/ptx_sm90.cuh"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <optional>
#include <unordered_map>
#include <vector>

#include "cuda_emulator/asan.h"

namespace tetris::cuda::emulator {
namespace {

std::string str(int64_t v) { return std::to_string(v); }

// -- mbarrier -------------------------------------------------------------------------------------

struct Mbarrier {
  static constexpr uint64_t kMark = 0xb4221e2b4221e200;  // what lies in shared memory meanwhile
  static constexpr int64_t kMaxArrivals = (1 << 20) - 1, kMaxBytes = (1 << 20) - 1;

  uint64_t phase = 0;
  int64_t expected = 0, pending = 0, bytes = 0;
  bool fenced = false;
  int initialized_by = -1;

  void arrive(const char* what, Site site) {
    if (--pending < 0)
      violate(what, site, "more than the " + str(expected) + " arrivals of a phase");
    advance();
  }
  void expect(int64_t more, const char* what, Site site) {
    bytes += more;
    if (bytes > kMaxBytes || bytes < -kMaxBytes)
      violate(what, site, "the barrier's bytes must be below 2^20 (they are " + str(bytes) + ")");
    advance();
  }

 private:
  void advance() {
    if (pending > 0 || bytes != 0) return;
    ++phase;
    pending = expected;
  }
};

// -- wgmma ----------------------------------------------------------------------------------------

struct Multiply {
  std::array<float*, kWarp> d;
  int n;
  uint64_t a, b;
  bool transposed;
  float (*to_float)(uint16_t);
  const char* what;
  Site site;

  bool same(const Multiply& other) const {  // what all warps of a group must agree on
    return n == other.n && a == other.a && b == other.b && transposed == other.transposed &&
           to_float == other.to_float && site == other.site;
  }
};

struct WarpState {
  bool fenced = false;  // since the last wgmma
  std::array<float*, kWarp> d{};
  std::vector<float> known;             // registers as wgmma left them or saw them, by lane
  std::optional<Actions::Ticket> last;  // not yet in a group
  std::deque<std::optional<Actions::Ticket>> groups;  // committed; the newest at the back
  uint64_t issued = 0;
  int registers = 0;
};

struct BulkGroups {
  std::vector<Actions::Ticket> open;
  std::deque<std::vector<Actions::Ticket>> committed;
};

struct Sm90 : Extension {
  std::unordered_map<uint32_t, Mbarrier> barriers;
  std::unordered_map<uint32_t, int> unfenced;  // 16-byte pieces that a thread stored: which thread
  std::unordered_map<int, BulkGroups> bulk;    // by thread
  std::unordered_map<int, WarpState> warps;
  std::unordered_map<int, std::deque<Multiply>> issued;  // by warp group
  std::unordered_map<int, uint64_t> dropped;             // ... and how many of them all have done
  int64_t free_registers = 0;
};

Sm90& state() { return this_cta().extension<Sm90>(); }

Mbarrier& find(uint64_t* barrier, const char* what, Site site) {
  const uint32_t address = shared_memory().address(barrier, what, site, 8, 8);
  const auto found = state().barriers.find(address);
  if (found == state().barriers.end() || *barrier != Mbarrier::kMark)
    violate(what, site, "not an initialized mbarrier");
  Mbarrier& b = found->second;
  if (!b.fenced && b.initialized_by != this_thread().number)
    violate(what, site, "an mbarrier that was not fenced after it was initialized");
  return b;
}

// What the async proxy reads must have been fenced if threads wrote it.
void check_fenced(const Sm90& s, uint32_t address, const char* what, Site site) {
  if (s.unfenced.empty()) return;
  const auto found = s.unfenced.find(address / 16);
  if (found != s.unfenced.end())
    violate(what, site,
            "reads shared memory that thread " + str(found->second) +
                " wrote without a fence_proxy_async since");
}

// -- tensor maps ----------------------------------------------------------------------------------

DecodedMap decode(const TensorMap* map, int rank, const char* what, Site site) {
  DecodedMap decoded;
  std::memcpy(&decoded, map->opaque, sizeof decoded);
  if (decoded.magic != DecodedMap::kMagic) violate(what, site, "not a tensor map");
  if (rank != 0 && decoded.box.rank != rank)
    violate(what, site, "the map has rank " + str(decoded.box.rank));
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) violate(what, site, "a map that is not aligned");
  if (shared_memory().contains(decoded.box.base) || on_a_stack(decoded.box.base))
    violate(what, site, "the map's tensor is not in global memory");
  return decoded;
}

// 16-byte pieces change places as bits 7.. of the address say (PTX ISA, "Swizzling Modes").
uint32_t swizzle(uint32_t address, int row_bytes) {
  const uint32_t mask = row_bytes == 128 ? 7 : row_bytes == 64 ? 3 : row_bytes == 32 ? 1 : 0;
  return address ^ (address >> 7 & mask) << 4;
}

// Calls fn(shared address, global element or nullptr where it is outside the tensor) for all
// elements of the box.
template <class Fn>
void for_each_element(const TensorBox& box, const std::array<int, 4>& at, uint32_t shared, Fn fn) {
  std::array<int, 4> i{};
  uint32_t number = 0;
  for (;;) {
    bool inside = true;
    int64_t offset = 0;
    for (int r = 0; r < box.rank; ++r) {
      const int64_t c = at[r] + int64_t{i[r]} * box.step[r];
      inside = inside && c >= 0 && c < box.extent[r];
      offset += c * box.stride[r];
    }
    fn(swizzle(shared + 2 * number, 2 * box.box[0]),
       inside ? static_cast<uint16_t*>(const_cast<void*>(box.base)) + offset : nullptr);
    ++number;
    int r = 0;
    while (r < box.rank && ++i[r] == box.box[r]) i[r++] = 0;
    if (r == box.rank) return;
  }
}

void check_allocated(const void* p, size_t bytes, const char* what, Site site) {
  if (!permitted(p, bytes)) violate(what, site, "an address that is in no allocation");
}

uint16_t& shared_element(uint32_t address, const char* what, Site site) {
  return *reinterpret_cast<uint16_t*>(shared_memory().pointer(address, what, site, 2, 2));
}

}  // namespace

uint32_t wgmma_element(uint64_t descriptor, bool transposed, int mn, int k) {
  const auto field = [&](int low, int bits) {
    return uint32_t(descriptor >> low & ((uint64_t{1} << bits) - 1));
  };
  const uint32_t start = field(0, 14) << 4, leading = field(16, 14) << 4,
                 stride = field(32, 14) << 4;
  constexpr int kRowBytes[] = {16, 128, 64, 32};
  int row_bytes = kRowBytes[field(62, 2)];
  uint32_t address = start;
  if (!transposed) {  // ((8,m),(T,2)):((row,SBO),(1,LBO or T)), T = 8
    address += mn / 8 * stride + mn % 8 * row_bytes + k % 8 * 2;
    address += k / 8 * (row_bytes == 16 ? leading : 16);
  } else if (row_bytes == 16) {  // ((T,1,m),(8,k)):((1,T,SBO),(T,LBO))
    address += mn / 8 * stride + mn % 8 * 2 + k % 8 * 16 + k / 8 * leading;
  } else {  // ((T,row / 16,m),(8,k)):((1,T,LBO),(row,SBO))
    const int row = row_bytes / 2;
    address += mn / row * leading + mn % row * 2 + k % 8 * row_bytes + k / 8 * stride;
  }
  return swizzle(address, row_bytes);
}

namespace {

void check_descriptor(uint64_t descriptor, const char* what, Site site) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, mode = uint32_t(descriptor >> 62);
  if (descriptor & 0x3ff1c000c000c000 & ~(uint64_t{7} << 49))
    violate(what, site, "a descriptor with bits between its fields");
  // The base offset is 0 where the pattern of the swizzle begins at a multiple of its size.
  const uint32_t pattern = mode == 1 ? 1024 : mode == 2 ? 512 : mode == 3 ? 256 : 16;
  const uint32_t row = pattern / 8;
  if ((descriptor >> 49 & 7) != 0 || (mode != 0 && start % pattern >= row))
    violate(what, site, "a descriptor whose swizzle begins within its pattern");
}

// The rows of one warp.
void multiply(const Multiply& m, int warp) {
  Sm90& s = state();
  WarpState& w = s.warps[warp];
  for (int l = 0; l < kWarp; ++l) {
    if (this_cta().thread(warp * kWarp + l).state == Thread::State::kEnded)
      violate(m.what, m.site, "its warp ended before it was complete");
    if (std::memcmp(m.d[l], &w.known[l * m.n / 2], m.n / 2 * sizeof(float)) != 0)
      violate(m.what, m.site, "its registers were changed before it was complete");
  }
  uint64_t a = m.a, b = m.b;
  bool transposed = m.transposed;
  if (sabotage() == Sabotage::kWrongSwizzle) {  // 128 and 64 bytes change places, 32 becomes 64
    a = (a & ~(uint64_t{3} << 62)) | uint64_t{a >> 62 == 2 ? 1u : 2u} << 62;
    b = (b & ~(uint64_t{3} << 62)) | uint64_t{b >> 62 == 2 ? 1u : 2u} << 62;
  }
  if (sabotage() == Sabotage::kWrongStride) b += b & (uint64_t{0x3fff} << 32);
  if (sabotage() == Sabotage::kWrongMajor) transposed = !transposed;
  constexpr int kDepth = 16;
  float left[16][kDepth];
  static float right[256][kDepth];
  const auto load = [&](uint64_t descriptor, bool trans, int mn, int k) {
    const uint32_t address = wgmma_element(descriptor, trans, mn, k);
    check_fenced(s, address, m.what, m.site);
    return m.to_float(shared_element(address, m.what, m.site));
  };
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k) left[i][k] = load(a, transposed, warp % 4 * 16 + i, k);
  for (int j = 0; j < m.n; ++j)
    for (int k = 0; k < kDepth; ++k) right[j][k] = load(b, false, j, k);
  for (int l = 0; l < kWarp; ++l)
    for (int i = 0; i < m.n / 2; ++i) {
      const int row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
      float sum = m.d[l][i];
      for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[column][k];
      m.d[l][i] = sum;
      w.known[l * m.n / 2 + i] = sum;
    }
}

}  // namespace
}  // namespace tetris::cuda::emulator

namespace tetris::cuda::ptx {

using namespace emulator;

// -- mbarrier -------------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, int arrivals, Site site) {
  const uint32_t address = shared_memory().address(barrier, "mbarrier_init", site, 8, 8);
  if (arrivals < 1 || arrivals > Mbarrier::kMaxArrivals)
    violate("mbarrier_init", site, "arrivals must be in [1, 2^20)");
  Mbarrier b;
  b.expected = b.pending = arrivals;
  b.initialized_by = this_thread().number;
  if (!state().barriers.emplace(address, b).second)
    violate("mbarrier_init", site, "a barrier that is in use");
  *barrier = Mbarrier::kMark;
}

void fence_mbarrier_init() {
  if (sabotage() == Sabotage::kNoInitFence) return;
  for (auto& [address, b] : state().barriers)
    if (b.initialized_by == this_thread().number) b.fenced = true;
}

void mbarrier_arrive(uint64_t* barrier, Site site) {
  Mbarrier& b = find(barrier, "mbarrier_arrive", site);
  b.arrive("mbarrier_arrive", site);
  if (sabotage() == Sabotage::kTwoArrivals) b.arrive("mbarrier_arrive", site);
}

void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes, Site site) {
  Mbarrier& b = find(barrier, "mbarrier_arrive_expect_tx", site);
  if (sabotage() == Sabotage::kFewerBytes) bytes -= 16;
  b.expect(bytes, "mbarrier_arrive_expect_tx", site);
  b.arrive("mbarrier_arrive_expect_tx", site);
}

bool mbarrier_try_wait(uint64_t* barrier, int parity, Site site) {
  Mbarrier& b = find(barrier, "mbarrier_try_wait", site);
  if (parity != 0 && parity != 1)
    violate("mbarrier_try_wait", site, "parity must be 0 or 1 (got " + str(parity) + ")");
  if (sabotage() == Sabotage::kNoWait) return true;
  if (sabotage() == Sabotage::kWrongPhase) parity ^= 1;
  const auto complete = [&b, parity] { return int(b.phase & 1) != parity; };
  if (this_cta().random.one_in(8)) {
    this_cta().yield();
    return complete();
  }
  this_cta().wait_until(complete, "mbarrier_try_wait", site);
  return true;
}

void fence_proxy_async() {
  if (sabotage() == Sabotage::kNoProxyFence) return;
  auto& unfenced = state().unfenced;
  for (auto i = unfenced.begin(); i != unfenced.end();)
    i = i->second == this_thread().number ? unfenced.erase(i) : std::next(i);
}

// -- bulk copies ----------------------------------------------------------------------------------

void prefetch_tensor_map(const TensorMap* map, Site site) {
  decode(map, 0, "prefetch_tensor_map", site);
}

void tma_load_4d(void* shared, const TensorMap* map, int at0, int at1, int at2, int at3,
                 uint64_t* barrier, Site site) {
  const char* const what = "tma_load_4d";
  const DecodedMap m = decode(map, 4, what, site);
  const uint32_t to = shared_memory().address(shared, what, site, m.box_bytes(), 128);
  Mbarrier& b = find(barrier, what, site);
  if (!b.fenced) violate(what, site, "an mbarrier that was not fenced after it was initialized");
  std::memset(shared, kPoison, m.box_bytes());
  this_cta().actions.post([=, &b] {
    for_each_element(m.box, {at0, at1, at2, at3}, to, [&](uint32_t address, uint16_t* from) {
      if (from) check_allocated(from, 2, what, site);
      shared_element(address, what, site) = from ? *from : 0;
    });
    b.expect(-m.box_bytes(), what, site);
  });
}

void tma_store_4d(const TensorMap* map, int at0, int at1, int at2, int at3, const void* shared,
                  Site site) {
  const char* const what = "tma_store_4d";
  const DecodedMap m = decode(map, 4, what, site);
  const uint32_t from = shared_memory().address(shared, what, site, m.box_bytes(), 128);
  const Actions::Ticket ticket = this_cta().actions.post([=] {
    if (this_cta().alive() == 0)
      violate(what, site, "the CTA ended before its shared memory had been read");
    const Sm90& s = state();
    for_each_element(m.box, {at0, at1, at2, at3}, from, [&](uint32_t address, uint16_t* to) {
      check_fenced(s, address, what, site);
      if (!to) return;
      check_allocated(to, 2, what, site);
      *to = shared_element(address, what, site);
    });
  });
  state().bulk[this_thread().number].open.push_back(ticket);
}

void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier, Site site) {
  const char* const what = "bulk_load";
  if (bytes < 16 || bytes % 16 != 0)
    violate(what, site, "bytes must be a multiple of 16 (got " + str(bytes) + ")");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    violate(what, site, "the source is not aligned to 16 bytes");
  shared_memory().address(shared, what, site, bytes, 16);
  Mbarrier& b = find(barrier, what, site);
  if (!b.fenced) violate(what, site, "an mbarrier that was not fenced after it was initialized");
  if (shared_memory().contains(global) || on_a_stack(global))
    violate(what, site, "the source is not in global memory");
  check_allocated(global, bytes, what, site);
  std::memset(shared, kPoison, bytes);
  this_cta().actions.post([=, &b] {
    std::memcpy(shared, global, bytes);
    b.expect(-int64_t{bytes}, what, site);
  });
}

void bulk_commit() {
  BulkGroups& g = state().bulk[this_thread().number];
  g.committed.push_back(std::move(g.open));
  g.open.clear();
}

void bulk_wait_read(int pending) {
  if (sabotage() == Sabotage::kNoReadWait) return;
  BulkGroups& g = state().bulk[this_thread().number];
  for (; int(g.committed.size()) > pending; g.committed.pop_front())
    for (const Actions::Ticket ticket : g.committed.front()) this_cta().actions.finish(ticket);
}

// -- warps and registers --------------------------------------------------------------------------

void named_barrier(int id, int threads, Site site) {
  if (sabotage() == Sabotage::kNoBarrier) return;
  this_cta().barrier(id, "named_barrier", site).sync(threads, false, "named_barrier", site);
}

// The kernel has as many registers as fit for each thread; those given back go to a pool.
void set_max_registers(int registers, bool up, Site site) {
  const char* const what = up ? "set_max_registers_up" : "set_max_registers_down";
  const int thread = this_thread().number;
  this_cta().warp_group().meet(thread, what, site);
  Sm90& s = state();
  int& own = s.warps[thread / kWarp].registers;
  if (own == 0) own = std::min(65536 / this_cta().threads() / 8 * 8, 255);
  if (up ? registers < own : registers > own)
    violate(what, site, "the warp has " + str(own) + " registers");
  this_cta().warp().meet(thread, what, site);
  if (up) {
    this_cta().wait_until(
        [&s, &own, registers] {
          return own == registers || s.free_registers >= int64_t{kWarp} * (registers - own);
        },
        what, site);
  }
  s.free_registers += int64_t{kWarp} * (own - registers);
  own = registers;
}

void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4], Site site) {
  const char* const what = "stmatrix_x4_trans";
  const int thread = this_thread().number;
  struct Row {
    uint16_t* to;
    const uint32_t* registers;
    int thread;
  } mine{static_cast<uint16_t*>(shared_row), r, thread};
  const uint32_t address = shared_memory().address(shared_row, what, site, 16, 16);
  state().unfenced[address / 16] = thread;
  this_cta().warp().meet(thread, what, site, mine, [&](Row* const* all) {
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i)
        for (int c = 0; c < 2; ++c)
          all[8 * i + l % 4 * 2 + c]->to[l / 4] =
              static_cast<uint16_t>(all[l]->registers[i] >> 16 * c);
  });
}

// -- wgmma ----------------------------------------------------------------------------------------
//
// Warps of a group come to the instructions in their own time, and each has a queue of its own for
// its 16 rows; they must only come with the same operands in the same order.

void wgmma_fence(Site site) {
  this_cta().warp().meet(this_thread().number, "wgmma_fence", site);
  if (sabotage() == Sabotage::kNoWgmmaFence) return;
  state().warps[this_thread().number / kWarp].fenced = true;
}

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool transposed, float (*to_float)(uint16_t),
           const char* what, Site site) {
  const int thread = this_thread().number, warp = thread / kWarp;
  Multiply mine{{}, n, a, b, transposed, to_float, what, site};
  mine.d[0] = d;
  check_descriptor(a, what, site);
  check_descriptor(b, what, site);
  this_cta().warp().meet(thread, what, site, mine, [&](Multiply* const* all) {
    Sm90& s = state();
    WarpState& w = s.warps[warp];
    Multiply m = mine;
    for (int l = 0; l < kWarp; ++l) {
      if (!all[l]->same(m)) violate(what, site, "lanes came with different descriptors");
      m.d[l] = all[l]->d[0];
    }

    std::deque<Multiply>& issued = s.issued[warp / 4];
    uint64_t& dropped = s.dropped[warp / 4];
    const uint64_t number = w.issued++ - dropped;
    if (number == issued.size()) issued.push_back(m);
    if (!issued[number].same(m)) violate(what, site, "warps came with different descriptors");
    uint64_t all_have = w.issued;
    for (int i = 0; i < 4; ++i) all_have = std::min(all_have, s.warps[warp / 4 * 4 + i].issued);
    for (; dropped < all_have; ++dropped) issued.pop_front();

    const size_t each = n / 2;
    bool changed = w.d != m.d || w.known.size() != kWarp * each;
    for (int l = 0; l < kWarp && !changed; ++l)
      changed = std::memcmp(m.d[l], &w.known[l * each], each * sizeof(float)) != 0;
    if (changed && !w.fenced)
      violate(what, site, "its registers were written without a wgmma_fence since");
    if (changed && w.last && !this_cta().actions.done(*w.last))
      violate(what, site, "its registers were changed while another wgmma had them");
    w.d = m.d;
    w.known.resize(kWarp * each);
    for (int l = 0; l < kWarp; ++l) std::memcpy(&w.known[l * each], m.d[l], each * sizeof(float));
    w.fenced = false;
    w.last = this_cta().actions.post(uint64_t(warp), [m, warp] { multiply(m, warp); });
  });
}

void wgmma_commit(Site site) {
  const int thread = this_thread().number;
  int nothing = 0;
  this_cta().warp().meet(thread, "wgmma_commit", site, nothing, [&](int* const*) {
    WarpState& w = state().warps[thread / kWarp];
    w.groups.push_back(w.last);
  });
}

void wgmma_wait(int pending, Site site) {
  const int thread = this_thread().number;
  int nothing = 0;
  this_cta().warp().meet(thread, "wgmma_wait", site, nothing, [&](int* const*) {
    if (sabotage() == Sabotage::kNoWgmmaWait) return;
    WarpState& w = state().warps[thread / kWarp];
    for (; int(w.groups.size()) > pending; w.groups.pop_front())
      if (w.groups.front()) this_cta().actions.finish(*w.groups.front());
  });
}

}  // namespace tetris::cuda::ptx

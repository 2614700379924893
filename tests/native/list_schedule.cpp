// Prints what every worker of a launch computes: one line "worker row col begin end turn parts
// slot" for each piece, in the worker's order.
//
//   list_schedule mma|wgmma WIDTH STEPS WORKERS DIVIDE
#include <cstdio>
#include <cstdlib>
#include <string>

#include "layout.h"

template <class L>
void list(int d, int steps, int workers, bool divide) {
  using Schedule = fastcov::cuda::Schedule<typename L::Triangle>;
  const Schedule schedule({d}, steps, workers, divide);
  for (int worker = 0; worker < workers; ++worker) {
    typename Schedule::Next next;
    fastcov::cuda::Piece p;
    while (schedule.take(worker, &next, &p)) {
      std::printf("%d %d %d %d %d %d %d %d\n", worker, p.tile.row, p.tile.col, p.begin, p.end,
                  p.turn, p.parts, p.slot);
    }
  }
}

int main(int, char** argv) {
  const int numbers[] = {std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4])};
  const bool divide = std::atoi(argv[5]) != 0;
  const auto run =
      std::string(argv[1]) == "mma" ? list<fastcov::cuda::Mma<2>> : list<fastcov::cuda::Wgmma<2>>;
  run(numbers[0], numbers[1], numbers[2], divide);
}

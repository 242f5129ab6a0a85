// A library to be loaded first: the time of day of a process is CLOCK_SKEW seconds ahead of this machine's.

#include <cstdlib>
#include <ctime>

#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

extern "C" {

int clock_gettime(clockid_t clock, timespec* now) noexcept {
  const int status = static_cast<int>(syscall(SYS_clock_gettime, clock, now));
  const char* skew = std::getenv("CLOCK_SKEW");
  if (skew != nullptr && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    now->tv_sec += std::atol(skew);
  }
  return status;
}

int gettimeofday(timeval* now, void*) noexcept {
  timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  *now = {exact.tv_sec, exact.tv_nsec / 1000};
  return 0;
}

time_t time(time_t* now) noexcept {
  timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  return now != nullptr ? *now = exact.tv_sec : exact.tv_sec;
}
}

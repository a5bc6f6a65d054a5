// Memory of one call. No allocation fails unseen: who holds an array that is not `ok` gives up,
// and module.cpp raises MemoryError.
#pragma once

template <class T>
struct Array {
  T* data;
  explicit Array(int64_t count) : data((T*)malloc(sizeof(T) * size_t(count) + 64)) {}
  ~Array() { free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  bool ok() const { return data != nullptr; }
  T& operator[](int64_t i) { return data[i]; }
};

// An open namespace as Python holds it.
#pragma once

#include <memory>
#include <utility>

#include "clients/cpp/block_store.h"
#include "clients/cpp/pool.h"

namespace kvtide::python {

// Keeps its pool.
class OpenStore {
 public:
  OpenStore(std::shared_ptr<client::Pool> pool, std::unique_ptr<client::BlockStore> store)
      : pool_(std::move(pool)), store_(std::move(store)) {}
  client::BlockStore& store() const { return *store_; }
  const std::shared_ptr<client::Pool>& pool() const { return pool_; }

 private:
  std::shared_ptr<client::Pool> pool_;
  std::unique_ptr<client::BlockStore> store_;
};

}  // namespace kvtide::python

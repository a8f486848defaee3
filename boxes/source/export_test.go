// SPDX-License-Identifier: Apache-2.0

package source

import "time"

// SetBackoff makes retries quick.
func (r *Resolver) SetBackoff(d time.Duration) { r.backoff = d }

// FindSum is findSum.
var FindSum = findSum

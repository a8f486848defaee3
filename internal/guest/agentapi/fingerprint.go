// SPDX-License-Identifier: Apache-2.0

package agentapi

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
)

// Fingerprint returns a name for what lasts of the identity: equal for equal ones.
// It tells the host whether the guest still has the identity it was given.
func (id Identity) Fingerprint() string {
	b, err := json.Marshal(id.Lasting())
	if err != nil {
		panic(err) // plain data: cannot happen
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

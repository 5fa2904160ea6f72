package main

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"slices"
	"time"
)

// sealTime is how long the cipher is measured before each round: some hundred records.
const sealTime = 10 * time.Millisecond

// sealRate is how many MB/s one core seals with AES-256-GCM in records of 64 KiB, with nothing beside it.
// What a tunnel that encrypts reaches of one that does not hangs on it, and it is not the same on all
// machines, nor at all times on one that others share.
func sealRate() (float64, error) {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		return 0, fmt.Errorf("measuring the cipher: %w", err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return 0, fmt.Errorf("measuring the cipher: %w", err)
	}
	nonce, record := make([]byte, gcm.NonceSize()), make([]byte, 64<<10)
	sealed := make([]byte, 0, len(record)+gcm.Overhead())
	n, start := 0, time.Now()
	for time.Since(start) < sealTime {
		gcm.Seal(sealed, nonce, record, nil)
		n += len(record)
	}
	return float64(n) / 1e6 / time.Since(start).Seconds(), nil
}

// cipherLine says what sealRate gave before the rounds; "" when there were none.
func cipherLine(rates []float64) string {
	if len(rates) == 0 {
		return ""
	}
	return fmt.Sprintf("AES-256-GCM on one core before each round: median %.0f MB/s, %.0f to %.0f", median(rates), slices.Min(rates), slices.Max(rates))
}

package boltstore

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"kuma/internal/resource"
)

// sumSize is the length of a record's checksum, in bytes.
const sumSize = 8

// seal puts a checksum of key and payload before the payload.
func seal(key, payload []byte) []byte {
	value := make([]byte, sumSize, sumSize+len(payload))
	binary.BigEndian.PutUint64(value, checksum(key, payload))
	return append(value, payload...)
}

// unseal checks a record and returns its checksum and its payload.
func unseal(key, value []byte) (uint64, []byte, error) {
	if len(value) < sumSize {
		return 0, nil, errors.New("it is missing or cut off")
	}
	sum, payload := sumOf(value), value[sumSize:]
	if checksum(key, payload) != sum {
		return 0, nil, errors.New("its checksum is wrong")
	}
	return sum, payload, nil
}

func sumOf(value []byte) uint64 { return binary.BigEndian.Uint64(value) }

// checksum is the beginning of a SHA-256: against accidents, not attackers.
func checksum(key, payload []byte) uint64 {
	h := sha256.New()
	h.Write(key)
	h.Write([]byte{0})
	h.Write(payload)
	var sum [sha256.Size]byte
	return binary.BigEndian.Uint64(h.Sum(sum[:0]))
}

// formatKey is unambiguous because no part of a key may have a NUL in it.
func formatKey(k resource.Key) []byte {
	return []byte(k.Kind + "\x00" + k.Mesh + "\x00" + k.Name)
}

func parseKey(b []byte) (resource.Key, error) {
	parts := strings.Split(string(b), "\x00")
	if len(parts) != 3 {
		return resource.Key{}, fmt.Errorf("the key %q is not one of a resource", b)
	}
	return resource.Key{Kind: parts[0], Mesh: parts[1], Name: parts[2]}, nil
}

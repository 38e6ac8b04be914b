using System.Buffers.Binary;
using System.IO.Hashing;
using System.Runtime.InteropServices;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// The pool of KV blocks: reference counts, and a cache of full blocks keyed by a hash chain over everything their keys and values depend
/// on: parent block, tokens, weights version, cache salt. A block of other weights has another key and cannot be hit, so an update needs
/// no flush.
/// <code>
///   used:   ReferenceCount > 0, held by samples
///   free:   ReferenceCount = 0, in a list in order of allocation; a free block may still hold a cached prefix,
///           which is evicted when the block is allocated
/// </code>
/// </summary>
public sealed class KvBlocks
{
    private const int None = -1;
    private const int BlockTokens = KvCache.BlockTokens;

    private readonly int[] _references;
    private readonly UInt128[] _hashes; // 0: not cached
    private readonly int[] _next;       // free list, doubly linked; index _references.Length is its head and tail
    private readonly int[] _previous;
    private readonly Dictionary<UInt128, int> _cached;

    public KvBlocks(int count)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(count, 1);
        Total = count;
        _references = new int[count];
        _hashes = new UInt128[count];
        _next = new int[count + 1];
        _previous = new int[count + 1];
        _cached = new Dictionary<UInt128, int>(count);
        _next[count] = _previous[count] = count;
        for (int block = 0; block < count; block++) InsertFree(block, after: _previous[count]);
    }

    public int Total { get; }

    public int Free { get; private set; }

    public int Used => Total - Free;

    /// <summary>Free blocks that still hold a prefix.</summary>
    public int Cached { get; private set; }

    /// <summary>The number of blocks needed for this many tokens.</summary>
    public static int CountFor(int tokens) => (tokens + BlockTokens - 1) / BlockTokens;

    /// <summary>The number of these tokens that are in full blocks.</summary>
    public static int FullTokens(int tokens) => tokens / BlockTokens * BlockTokens;

    /// <summary>
    /// The key of a full block. Source of the scheme: vLLM's and SGLang's prefix caches, plus the version by construction.
    /// </summary>
    public static UInt128 Hash(UInt128 parent, ReadOnlySpan<int> tokens, ulong version, UInt128 salt)
    {
        Span<byte> key = stackalloc byte[16 + 16 + 8 + BlockTokens * sizeof(int)];
        BinaryPrimitives.WriteUInt128LittleEndian(key, parent);
        BinaryPrimitives.WriteUInt128LittleEndian(key[16..], salt);
        BinaryPrimitives.WriteUInt64LittleEndian(key[32..], version);
        MemoryMarshal.AsBytes(tokens).CopyTo(key[40..]);
        UInt128 hash = XxHash128.HashToUInt128(key);
        return hash == 0 ? 1 : hash;
    }

    /// <summary>
    /// Gives <paramref name="sequence"/> blocks for its first <paramref name="tokens"/> tokens, or none when too few are free.
    /// </summary>
    internal bool TryGrow(Sequence sequence, int tokens)
    {
        int wanted = CountFor(tokens);
        if (wanted - sequence.BlockCount > Free) return false;
        while (sequence.BlockCount < wanted) sequence.BlockTable[sequence.BlockCount++] = Take();
        return true;
    }

    /// <summary>
    /// Gives the sequence the longest cached prefix, at most all but its last token (a step needs one row to compute logits). Returns the
    /// number of tokens found.
    /// </summary>
    internal int AttachPrefix(Sequence sequence, ulong version, UInt128 salt)
    {
        ReadOnlySpan<int> tokens = sequence.AllTokens;
        UInt128 parent = 0;
        int most = (tokens.Length - 1) / BlockTokens;
        while (sequence.BlockCount < most)
        {
            UInt128 hash = Hash(parent, tokens.Slice(sequence.BlockCount * BlockTokens, BlockTokens), version, salt);
            if (!_cached.TryGetValue(hash, out int block)) break;
            Share(block);
            sequence.BlockTable[sequence.BlockCount++] = block;
            parent = hash;
        }

        sequence.HashedBlocks = sequence.BlockCount;
        sequence.BlockHash = parent;
        return sequence.BlockCount * BlockTokens;
    }

    /// <summary>Caches the sequence's blocks that have become full since the last call.</summary>
    internal void CacheFullBlocks(Sequence sequence, ulong version, UInt128 salt)
    {
        if (!sequence.SingleVersionKv) return;
        ReadOnlySpan<int> tokens = sequence.AllTokens;
        int full = Math.Min(sequence.Computed, sequence.Total) / BlockTokens;
        while (sequence.HashedBlocks < full)
        {
            int at = sequence.HashedBlocks;
            UInt128 hash = Hash(sequence.BlockHash, tokens.Slice(at * BlockTokens, BlockTokens), version, salt);
            // Two samples may compute the same block at the same time; the first to finish is cached.
            if (_cached.TryAdd(hash, sequence.BlockTable[at])) _hashes[sequence.BlockTable[at]] = hash;
            sequence.BlockHash = hash;
            sequence.HashedBlocks++;
        }
    }

    /// <summary>
    /// Gives <paramref name="sibling"/> the leader's blocks for the first <paramref name="tokens"/> tokens. Full blocks are shared; for the
    /// last, partly filled one it gets its own block, to which the content must be copied. False, and no change, when no block is free.
    /// </summary>
    internal bool TryFork(Sequence leader, Sequence sibling, int tokens, out BlockCopy copy)
    {
        copy = new BlockCopy(None, None);
        int shared = tokens / BlockTokens;
        bool partial = tokens % BlockTokens != 0;
        if (partial && Free == 0) return false;
        for (; sibling.BlockCount < shared; sibling.BlockCount++)
        {
            int block = leader.BlockTable[sibling.BlockCount];
            Share(block);
            sibling.BlockTable[sibling.BlockCount] = block;
        }

        if (!partial) return true;
        copy = new BlockCopy(leader.BlockTable[shared], Take());
        sibling.BlockTable[sibling.BlockCount++] = copy.To;
        return true;
    }

    /// <summary>
    /// Frees all blocks of the sequence. Its last block is evicted first, so that long-lived prefixes stay cached longest.
    /// </summary>
    internal void Release(Sequence sequence)
    {
        for (int i = sequence.BlockCount - 1; i >= 0; i--) Drop(sequence.BlockTable[i]);
        sequence.BlockCount = 0;
        sequence.HashedBlocks = 0;
        sequence.BlockHash = 0;
    }

    /// <summary>Evicts all cached prefixes. Blocks in use keep their content but are no longer shared.</summary>
    internal void ForgetCached()
    {
        _cached.Clear();
        Array.Clear(_hashes);
        Cached = 0;
    }

    /// <summary>Throws unless every block is either free or used, exactly once, and the counts agree.</summary>
    public void CheckInvariant(bool idle)
    {
        int free = 0;
        int cached = 0;
        for (int block = _next[Total]; block != Total; block = _next[block])
        {
            if (_references[block] != 0) throw new InvalidOperationException($"KV block {block} is in the free list and referenced");
            if (_hashes[block] != 0) cached++;
            if (++free > Total) throw new InvalidOperationException("the free list of KV blocks has a cycle");
        }

        int used = 0;
        for (int block = 0; block < Total; block++)
        {
            if (_references[block] < 0) throw new InvalidOperationException($"KV block {block} was released twice");
            if (_references[block] > 0) used++;
            if (_hashes[block] != 0 && (!_cached.TryGetValue(_hashes[block], out int at) || at != block))
                throw new InvalidOperationException($"KV block {block} has a hash that is not in the cache");
        }

        if (free != Free || cached != Cached || used + free != Total)
            throw new InvalidOperationException($"KV blocks: {free} free ({Free}), {cached} cached ({Cached}), {used} used of {Total}");
        if (idle && used != 0) throw new InvalidOperationException($"{used} KV blocks leaked");
    }

    private int Take()
    {
        int block = _next[Total];
        RemoveFree(block);
        if (_hashes[block] != 0)
        {
            _cached.Remove(_hashes[block]);
            _hashes[block] = 0;
        }

        _references[block] = 1;
        return block;
    }

    private void Share(int block)
    {
        if (_references[block]++ == 0) RemoveFree(block);
    }

    private void Drop(int block)
    {
        if (--_references[block] > 0) return;
        // Empty blocks are allocated before those that hold a prefix.
        InsertFree(block, after: _hashes[block] == 0 ? Total : _previous[Total]);
    }

    private void InsertFree(int block, int after)
    {
        int next = _next[after];
        _next[block] = next;
        _previous[block] = after;
        _next[after] = block;
        _previous[next] = block;
        Free++;
        if (_hashes[block] != 0) Cached++;
    }

    private void RemoveFree(int block)
    {
        _next[_previous[block]] = _next[block];
        _previous[_next[block]] = _previous[block];
        Free--;
        if (_hashes[block] != 0) Cached--;
    }
}

using System.Buffers;

namespace Rollout.Engine;

/// <summary>
/// Byte-pair merging of one word at a time: the pair of lowest rank is merged first, the leftmost among equals, until none is left.
/// The pairs are kept in a heap, so that a word of n bytes takes O(n log n) time; rescanning the word after each merge is quadratic.
/// Holds scratch memory: one instance per thread and text.
/// </summary>
internal sealed class BytePairMerger(Dictionary<long, BytePairMerger.Merge> merges) : IDisposable
{
    // Ordered by rank, then place: the upper and lower half of one number.
    private readonly PriorityQueue<(int At, long Pair), long> _candidates = new();
    private int[] _ids = [];
    private int[] _next = [];
    private int[] _previous = [];

    /// <summary>The token that a pair becomes. Lower ranks are merged first.</summary>
    public readonly record struct Merge(int Rank, int Id);

    /// <summary>The key of a pair.</summary>
    public static long Pair(int left, int right) => (long)left << 32 | (uint)right;

    /// <summary>Merges a word given as the tokens of its bytes, and appends the resulting ids.</summary>
    public void Apply(ReadOnlySpan<byte> word, ReadOnlySpan<int> byteIds, List<int> output)
    {
        int count = word.Length;
        Reserve(count);
        for (int i = 0; i < count; i++)
        {
            _ids[i] = byteIds[word[i]];
            _previous[i] = i - 1;
            _next[i] = i + 1;
        }
        for (int i = 0; i + 1 < count; i++)
            Consider(i, i + 1);

        while (_candidates.TryDequeue(out (int At, long Pair) candidate, out _))
        {
            // Stale when either token has been merged since. A token merged away has id -1, which is in no pair.
            (int left, int right) = (candidate.At, _next[candidate.At]);
            if (right >= count || Pair(_ids[left], _ids[right]) != candidate.Pair)
                continue;
            _ids[left] = merges[candidate.Pair].Id;
            _ids[right] = -1;
            int after = _next[left] = _next[right];
            if (after < count)
            {
                _previous[after] = left;
                Consider(left, after);
            }
            if (_previous[left] >= 0)
                Consider(_previous[left], left);
        }
        for (int i = 0; i < count; i = _next[i])
            output.Add(_ids[i]);
    }

    public void Dispose() => Return();

    private void Consider(int left, int right)
    {
        long pair = Pair(_ids[left], _ids[right]);
        if (merges.TryGetValue(pair, out Merge merge))
            _candidates.Enqueue((left, pair), (long)merge.Rank << 32 | (uint)left);
    }

    private void Reserve(int count)
    {
        if (_ids.Length >= count)
            return;
        Return();
        _ids = ArrayPool<int>.Shared.Rent(count);
        _next = ArrayPool<int>.Shared.Rent(count);
        _previous = ArrayPool<int>.Shared.Rent(count);
    }

    private void Return()
    {
        foreach (int[] array in (int[][])[_ids, _next, _previous])
        {
            if (array.Length > 0)
                ArrayPool<int>.Shared.Return(array);
        }
        _ids = _next = _previous = [];
    }
}

namespace Rollout.Kernels.Cuda;

/// <summary>
/// Which block of attention.cu walks over what. A sequence with several rows is cut into tiles of rows, each of which walks over its whole context. A
/// single row with more than one chunk of context is cut by chunks, as long as there is room for the parts, and rows that have a chunk's blocks in
/// common share one item for it. How it is cut changes no bit: see attention.cu.
/// </summary>
internal sealed class CudaAttentionPlan
{
    /// <summary>Tokens of a chunk. As in attention.cu.</summary>
    public const int Chunk = 128;

    /// <summary>Most parts of one step: enough items to fill any device several times.</summary>
    public const int MostSlots = 4096;

    private const int ChunkBlocks = Chunk / KvCache.BlockTokens;

    private int _items;

    /// <summary>As in attention.cu, 5 numbers each.</summary>
    public int[] Items { get; private set; } = [];

    public int ItemCount => _items;

    /// <summary>By row: where the parts of its chunks begin, of rows that are cut.</summary>
    public int[] RowSlots { get; private set; } = [];

    /// <summary>Parts of all rows that are cut.</summary>
    public int Slots { get; private set; }

    /// <summary>Rows of the item that has most.</summary>
    public int MostRows { get; private set; }

    /// <summary>Most items that a step may need: one a row, or where a row is cut one a part.</summary>
    public static int MostItems(StepLayout step) => step.TokenIds.Length + MostSlots;

    /// <param name="step">What to cut.</param>
    /// <param name="rowsPerItem">Most rows of an item.</param>
    public void Build(StepLayout step, int rowsPerItem)
    {
        int most = 5 * MostItems(step);
        if (Items.Length < most)
            Items = new int[most];
        if (RowSlots.Length < step.TokenIds.Length)
            RowSlots = new int[step.TokenIds.Length];
        _items = 0;
        Slots = 0;
        MostRows = 0;
        for (int s = 0; s < step.SequenceCount;)
        {
            // Neighbours that are cut: the scheduler keeps the samples of a group together.
            int end = s;
            while (end < step.SequenceCount && IsCut(step, end))
                end++;
            if (end > s)
            {
                CutByChunks(step, s, end, rowsPerItem);
                s = end;
                continue;
            }

            int last = step.RowStart[s + 1];
            for (int row = step.RowStart[s]; row < last; row += rowsPerItem)
            {
                int rows = Math.Min(rowsPerItem, last - row);
                Add(row, rows, 0, (step.Positions[row + rows - 1] / Chunk) + 1, split: false);
            }

            s++;
        }
    }

    /// <summary>Whether it is; then its parts have their places.</summary>
    private bool IsCut(StepLayout step, int s)
    {
        int row = step.RowStart[s];
        if (step.RowStart[s + 1] - row != 1)
            return false;
        int chunks = (step.Positions[row] / Chunk) + 1;
        if (chunks == 1 || Slots + chunks > MostSlots)
            return false;
        RowSlots[row] = Slots;
        Slots += chunks;
        return true;
    }

    private void CutByChunks(StepLayout step, int begin, int end, int rowsPerItem)
    {
        int longest = 0;
        for (int s = begin; s < end; s++)
            longest = Math.Max(longest, (step.Positions[step.RowStart[s]] / Chunk) + 1);
        for (int chunk = 0; chunk < longest; chunk++)
        {
            for (int s = begin; s < end;)
            {
                int rows = 1;
                if (step.Positions[step.RowStart[s]] / Chunk >= chunk)
                {
                    while (rows < rowsPerItem && s + rows < end && Shares(step, s, s + rows, chunk))
                        rows++;
                    Add(step.RowStart[s], rows, chunk, 1, split: true);
                }

                s += rows;
            }
        }
    }

    /// <summary>Whether both see the whole of a chunk, in the same blocks.</summary>
    private static bool Shares(StepLayout step, int one, int other, int chunk)
    {
        int whole = ((chunk + 1) * Chunk) - 1, first = chunk * ChunkBlocks;
        return step.Positions[step.RowStart[one]] >= whole && step.Positions[step.RowStart[other]] >= whole
            && step.BlockTables.AsSpan((one * step.MaxBlocks) + first, ChunkBlocks)
                .SequenceEqual(step.BlockTables.AsSpan((other * step.MaxBlocks) + first, ChunkBlocks));
    }

    private void Add(int firstRow, int rows, int firstChunk, int chunks, bool split)
    {
        MostRows = Math.Max(MostRows, rows);
        Span<int> item = Items.AsSpan(5 * _items++, 5);
        (item[0], item[1], item[2], item[3], item[4]) = (firstRow, rows, firstChunk, chunks, split ? 1 : 0);
    }
}

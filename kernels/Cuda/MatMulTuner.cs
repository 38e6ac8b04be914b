using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>The algorithms of one shape, by row count; all of them give a row the same bits.</summary>
/// <param name="Digest">
/// Digest of these bits: what <see cref="MatMulProbe.Digest(in cublasLtMatmulAlgo, int, out byte[])"/> returns for each of them.
/// </param>
/// <param name="Algorithms">One for each of <see cref="MatMulTuner.Buckets"/> and one for more rows.</param>
internal sealed record MatMulChoice(byte[] Digest, cublasLtMatmulAlgo[] Algorithms)
{
    /// <summary>The algorithm for this many rows.</summary>
    public ref readonly cublasLtMatmulAlgo For(int rows) => ref Algorithms[MatMulTuner.BucketOf(rows)];
}

/// <summary>
/// Chooses algorithms. Two of cuBLASLt's may add a sum's products in different orders, and so round differently: they are sorted into
/// classes that give the same bits. Which class serves a shape is decided by a rule, never by measured time: a shape has the same bits
/// whatever else the machine was doing at its first start. Within the class the fastest is taken for each row count, which changes no bit.
/// <para>
/// The rule: of the classes whose algorithms together serve all row counts, the one that the library's heuristic ranks best. An algorithm
/// serves a bucket of row counts when it runs at all that are checked of it, can be captured, and gives a row the same bits at all of them.
/// A class is ranked by the sum, over a fixed list of row counts, of the rank of its best algorithm among the proposals; among equals the
/// one proposed first is taken, going through the row counts upwards. Everything in it (what is proposed and in which order, what runs,
/// what the bits of fixed numbers are) is a function of the shape, the kind of device and the library's version: the heuristic is a table
/// and a model of the device in the library, which measures nothing.
/// </para>
/// </summary>
internal sealed class MatMulTuner
{
    /// <summary>The largest row count at which a stored choice is verified.</summary>
    public const int VerifiedRows = 257;

    private const int Few = 8, Some = 64, Many = 512;

    private static readonly int[] s_asked = [1, Few, Some, 256, 2048];
    private static readonly int[] s_checked = [1, 3, Few, 16, MatMulProbe.ReferenceRows, 256, 257, Many, 2048];
    private static readonly int[] s_verified = [3, 16, VerifiedRows];

    private readonly CudaDevice _device;
    private readonly MatMulShape _shape;
    private readonly MatMulProbe _probe;
    private readonly int[] _askedRows, _checkedRows;
    private readonly int _used; // buckets; a small device does not need the last ones

    /// <param name="device">What is chosen for.</param>
    /// <param name="shape">What is chosen for.</param>
    /// <param name="probe">Of the shape, for as many rows as the method called needs.</param>
    public MatMulTuner(CudaDevice device, MatMulShape shape, MatMulProbe probe)
    {
        _device = device;
        _shape = shape;
        _probe = probe;
        int most = MostRows(device, shape);
        _askedRows = [.. s_asked.Where(rows => rows < most), most];
        _checkedRows = [.. s_checked.Where(rows => rows < most), most];
        _used = BucketOf(most) + 1;
    }

    /// <summary>The most rows that each algorithm of a choice serves, except the last, which serves more.</summary>
    public static ReadOnlySpan<int> Buckets => [Few, Some, Many];

    /// <summary>The index in <see cref="MatMulChoice.Algorithms"/> of the one for this many rows.</summary>
    public static int BucketOf(int rows)
    {
        int bucket = 0;
        while (bucket < Buckets.Length && rows > Buckets[bucket])
            bucket++;
        return bucket;
    }

    /// <summary>
    /// The largest row count that an algorithm is checked at, and so the largest that is run: more rows are multiplied in pieces. 64 per
    /// multiprocessor, where tiles of any size keep all of them busy (8,448 on a device with 132), less where outputs would take over 512
    /// MiB; a multiple of 128, so that pieces keep their alignment.
    /// </summary>
    public static int MostRows(CudaDevice device, MatMulShape shape)
    {
        const int Multiple = 128;
        const long MostBytes = 512L << 20;
        long rows = Math.Min(64L * device.Multiprocessors, MostBytes / ((long)shape.Outputs * shape.OutputBytes));
        return (int)Math.Max(Many, rows / Multiple * Multiple);
    }

    /// <summary>Chooses by the rule. The probe is for <see cref="MostRows"/>.</summary>
    /// <exception cref="CudaException">
    /// No algorithm keeps rows independent; the message says how many were tried, and why each was rejected.
    /// </exception>
    public MatMulChoice Choose()
    {
        List<string> reasons = [];
        List<Candidate> candidates = Proposals(_askedRows, inPieces: false, reasons);
        int tried = candidates.Count;
        List<Class> classes = [];
        foreach (Candidate candidate in candidates)
        {
            if (DigestOf(candidate.Algorithm, out byte[] digest) is var status and not cublasStatus.CUBLAS_STATUS_SUCCESS)
            {
                reasons.Add($"did not run ({status.Name()})");
                continue;
            }

            Class? same = classes.Find(known => known.Digest.AsSpan().SequenceEqual(digest));
            if (same is null)
                classes.Add(same = new Class(digest));
            same.Members.Add(candidate);
        }

        // The best class is checked more closely; algorithms rejected here can only lower its rank, and then another may be the best.
        while (classes.MinBy(known => known.Score(_askedRows.Length)) is { } best)
        {
            if (best.Members.Find(member => member.Serves is null) is { } next)
            {
                string?[] whyNot = _probe.WhyNot(next.Algorithm, _checkedRows);
                next.Serves = [.. Enumerable.Range(0, _used).Select(bucket => RowsOf(bucket).All(i => whyNot[i] is null))];
                if (next.Serves.Contains(true))
                    continue;
                reasons.Add(whyNot.First(reason => reason is not null)!);
                best.Members.Remove(next);
            }
            else if (ByRows(best.Members) is { } algorithms)
            {
                return new MatMulChoice(best.Digest, algorithms);
            }
            else
            {
                reasons.AddRange(best.Members.Select(_ => "serves some row counts, but no algorithm with the same bits serves the others"));
                best.Members.Clear();
            }

            if (best.Members.Count == 0)
                classes.Remove(best);
        }

        string why = string.Join("; ", reasons.CountBy(reason => reason).Select(reason => $"{reason.Value} x {reason.Key}"));
        throw new CudaException($"None of {tried} cuBLASLt algorithms for a matmul of [{_shape.Outputs}, {_shape.Inputs}] serves all row "
            + $"counts on {_device.Name}: {why}.");
    }

    /// <summary>
    /// Whether a choice of an earlier start is still valid: its algorithms are accepted for all row counts, and give the bits of its class.
    /// The probe is for <see cref="VerifiedRows"/>.
    /// </summary>
    public bool Holds(MatMulChoice choice)
    {
        for (int bucket = 0; bucket <= Buckets.Length; bucket++)
        {
            cublasLtMatmulAlgo algorithm = choice.Algorithms[bucket];
            if (RowsOf(bucket).Any(i => _shape.Check(algorithm, _checkedRows[i], out _) != cublasStatus.CUBLAS_STATUS_SUCCESS))
                return false;
        }

        foreach (IGrouping<string, int> served in choice.Algorithms.Index().GroupBy(entry => Text(entry.Item), entry => entry.Index))
        {
            ref readonly cublasLtMatmulAlgo algorithm = ref choice.Algorithms[served.First()];
            if (DigestOf(algorithm, out byte[] digest) != cublasStatus.CUBLAS_STATUS_SUCCESS
                || !digest.AsSpan().SequenceEqual(choice.Digest))
            {
                return false;
            }

            int[] verified = [.. s_verified.Where(rows => served.Contains(BucketOf(rows)))];
            if (_probe.WhyNot(algorithm, verified).Any(reason => reason is not null))
                return false;
        }

        return true;
    }

    /// <summary>
    /// What all proposals for these row counts do, including those that split k; see <see cref="MatMulCandidate"/>. The probe is for the
    /// largest.
    /// </summary>
    public IReadOnlyList<MatMulCandidate> Survey(ReadOnlySpan<int> rowCounts, MatMulChoice? choice)
    {
        int[] counts = rowCounts.ToArray();
        HashSet<string> chosen = [.. choice is null ? [] : choice.Algorithms.Select(Text)];
        return [.. Proposals(counts, inPieces: true, []).Select(candidate => SurveyOf(candidate, counts) with
        {
            IsChosen = chosen.Contains(Text(candidate.Algorithm)),
        })];
    }

    /// <summary>An algorithm's bytes in hexadecimal.</summary>
    public static string Text(cublasLtMatmulAlgo algorithm) =>
        Convert.ToHexStringLower(MemoryMarshal.AsBytes(new ReadOnlySpan<cublasLtMatmulAlgo>(in algorithm)));

    private MatMulCandidate SurveyOf(Candidate candidate, int[] counts)
    {
        cublasLtMatmulAlgo algorithm = candidate.Algorithm;
        long workspace = 0;
        List<MatMulCandidateRows> found = [];
        for (int i = 0; i < counts.Length; i++)
        {
            int rows = counts[i], rank = candidate.Ranks.GetValueOrDefault(i, -1);
            cublasStatus status = _shape.Check(algorithm, rows, out long bytes);
            workspace = Math.Max(workspace, bytes);
            string[] digests = ["", "", "", ""];
            bool keeps = true;
            for (int f = 0; f < _probe.Forms.Length && status == cublasStatus.CUBLAS_STATUS_SUCCESS; f++)
            {
                (bool, bool) form = _probe.Forms[f];
                keeps &= _probe.TakeReference(algorithm, form) == cublasStatus.CUBLAS_STATUS_SUCCESS;
                status = _probe.Digest(algorithm, rows, form, out byte[] digest);
                digests[f] = Convert.ToHexStringLower(digest.AsSpan(0, Math.Min(16, digest.Length)));
                if (status != cublasStatus.CUBLAS_STATUS_SUCCESS || !keeps)
                    continue;
                _probe.QueueComparison(rows);
                keeps = _probe.Differences() == 0;
            }

            found.Add(status == cublasStatus.CUBLAS_STATUS_SUCCESS
                ? new MatMulCandidateRows(rows, rank, null, digests[0], digests[1], digests[2], keeps, _probe.Seconds(algorithm, rows))
                : new MatMulCandidateRows(rows, rank, status.Name(), "", "", "", false, double.PositiveInfinity));
        }

        return new MatMulCandidate(Text(algorithm), MatMulShape.Describe(algorithm), workspace, found);
    }

    /// <summary>What the heuristic proposes for these row counts, each once, in the order of its first proposal.</summary>
    private List<Candidate> Proposals(int[] rowCounts, bool inPieces, List<string> reasons)
    {
        List<Candidate> candidates = [];
        Dictionary<string, Candidate> known = [];
        List<cublasLtMatmulAlgo> found = [];
        for (int i = 0; i < rowCounts.Length; i++)
        {
            cublasStatus status = _shape.Propose(rowCounts[i], inPieces, found);
            if (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
                reasons.Add($"nothing proposed for {rowCounts[i]} rows ({status.Name()})");
            for (int rank = 0; rank < found.Count; rank++)
            {
                string text = Text(found[rank]);
                if (!known.TryGetValue(text, out Candidate? candidate))
                    candidates.Add(known[text] = candidate = new Candidate(found[rank]));
                candidate.Ranks.TryAdd(i, rank);
            }
        }

        return candidates;
    }

    /// <summary>Digest of an algorithm's results, which determines its class.</summary>
    private cublasStatus DigestOf(cublasLtMatmulAlgo algorithm, out byte[] digest)
    {
        digest = [];
        cublasStatus status = _shape.Check(algorithm, MatMulProbe.ReferenceRows, out _);
        return status == cublasStatus.CUBLAS_STATUS_SUCCESS ? _probe.Digest(algorithm, MatMulProbe.ReferenceRows, out digest) : status;
    }

    /// <summary>Which of the checked row counts belong to a bucket.</summary>
    private IEnumerable<int> RowsOf(int bucket) => Enumerable.Range(0, _checkedRows.Length).Where(i => BucketOf(_checkedRows[i]) == bucket);

    /// <summary>
    /// For each bucket the fastest algorithm that serves it, timed at its largest row count; null where a bucket has none.
    /// </summary>
    private cublasLtMatmulAlgo[]? ByRows(List<Candidate> members)
    {
        int[] rows = [.. Buckets, Math.Min(2048, _checkedRows[^1])];
        cublasLtMatmulAlgo[] algorithms = new cublasLtMatmulAlgo[rows.Length];
        for (int bucket = 0; bucket < _used; bucket++)
        {
            List<Candidate> serving = members.FindAll(member => member.Serves![bucket]);
            if (serving.Count == 0)
                return null;
            Candidate fastest = serving.Count == 1 ? serving[0] : serving.MinBy(member => _probe.Seconds(member.Algorithm, rows[bucket]))!;
            algorithms[bucket] = fastest.Algorithm;
        }

        algorithms.AsSpan(_used).Fill(algorithms[_used - 1]);
        return algorithms;
    }

    private sealed class Candidate(cublasLtMatmulAlgo algorithm)
    {
        public cublasLtMatmulAlgo Algorithm => algorithm;

        /// <summary>Ranks among the proposals, by the index of the row count.</summary>
        public Dictionary<int, int> Ranks { get; } = [];

        /// <summary>Which buckets it serves, once checked.</summary>
        public bool[]? Serves { get; set; }
    }

    private sealed class Class(byte[] digest)
    {
        public byte[] Digest => digest;

        public List<Candidate> Members { get; } = [];

        public int Score(int rowCounts) => Enumerable.Range(0, rowCounts)
            .Sum(i => Members.Min(member => member.Ranks.GetValueOrDefault(i, MatMulShape.MostProposals)));
    }
}

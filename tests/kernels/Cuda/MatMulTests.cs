using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Which of cuBLASLt's algorithms serve a shape: those of one class that give a row the same bits, chosen by rule. The simulated library
/// proposes algorithms that sum in different orders, at different speeds, and some that fail: see candidates() in
/// tests/cuda-sim/cublaslt.cpp.
/// </summary>
public sealed class MatMulTests : IDisposable
{
    private const int Outputs = 24, Inputs = 72;
    private const string FolderVariable = "ROLLOUT_TEST_FOLDER", ResultVariable = "ROLLOUT_TEST_RESULT";
    private const string CandidatesVariable = "ROLLOUT_SIM_MATMUL";

    private readonly string _folder = Directory.CreateTempSubdirectory("rollout-matmul-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    // ---- Bits by rule.

    [Fact]
    public void Orders_of_summation_differ_in_their_bits()
    {
        SimulatedDevice.RequireSimulated();
        Assert.Equal(3, new[] { Bits("up"), Bits("down"), Bits("halves") }.Distinct().Count());
    }

    [Theory]
    [InlineData("up time=100; down time=1")]
    [InlineData("up time=1; down time=100")]
    [InlineData("up time=7; down time=7; halves time=1")]
    public void Time_does_not_choose_the_bits(string candidates)
    {
        SimulatedDevice.RequireSimulated();
        Assert.Equal(Bits("up"), Bits(candidates));
    }

    [Theory]
    [InlineData("down; up", "down")]                                          // first everywhere
    [InlineData("up from=64; down", "down")]                                  // second for most row counts, but there for all of them
    [InlineData("halves fails=run; down every=300; up; halves time=1", "up")] // the first two are rejected
    [InlineData("down most=64; up", "up")]                                    // no algorithm with the first one's bits serves more rows
    [InlineData("down most=64; up; down least=64", "down")]                   // together they serve all rows
    public void The_class_that_the_heuristic_ranks_best_is_taken(string candidates, string expected)
    {
        SimulatedDevice.RequireSimulated();
        Assert.Equal(Bits(expected), Bits(candidates));
    }

    [Fact]
    public void Inside_a_class_the_fastest_serves()
    {
        SimulatedDevice.RequireSimulated();
        const string Candidates = "up time=9; down time=1; up time=3 workspace=16; up time=4";
        using Setup setup = new(_folder, Candidates);
        setup.MatMul.Prepare(Outputs, Inputs, MatMulOutput.Fp32);
        IReadOnlyList<MatMulCandidate> survey = setup.MatMul.Survey(Outputs, Inputs, MatMulOutput.Fp32, [1]);
        Assert.Equal([false, false, true, false], survey.Select(candidate => candidate.IsChosen));
        Assert.Equal(Bits("up"), Bits(Candidates));
    }

    /// <summary>
    /// The candidates' inputs and results stay on the device: those of the head of an 8B model would be arrays of gigabytes.
    /// </summary>
    [Fact]
    public void Choosing_takes_little_memory_of_the_host()
    {
        SimulatedDevice.RequireSimulated();
        const int Few = 64, Many = 4096;
        using Setup setup = new(_folder, "up; down");
        long before = GC.GetAllocatedBytesForCurrentThread();
        setup.MatMul.Prepare(Few, Many, MatMulOutput.Fp32);
        Assert.InRange(GC.GetAllocatedBytesForCurrentThread() - before, 1, Few * Many); // half the bytes of the weight
    }

    // ---- A row's bits do not depend on the number of rows.

    [Theory]
    [InlineData("down above=300; up")] // not visible at 256 rows
    [InlineData("down above=256; up")]
    [InlineData("down above=511; up")]
    [InlineData("down above=2; up")]
    [InlineData("down every=7; up")]   // by a row's place
    [InlineData("down above=300 when=bias; up")]
    [InlineData("down above=300 when=beta; up")]
    [InlineData("down above=1000; up")] // never so many rows at once
    [InlineData("up most=64; up above=300 least=64; up least=64; down")]
    // Each one exactly as far as it serves.
    [InlineData("up most=8; up least=9 most=64; up least=65 most=512; up least=513; up most=512; up least=1")]
    public void A_rows_bits_do_not_depend_on_the_number_of_rows(string candidates)
    {
        SimulatedDevice.RequireSimulated();
        const int Most = 1200;
        using Setup setup = new(_folder, candidates);
        foreach ((bool bias, MatMulOutput kind) in new[]
        {
            (false, MatMulOutput.Fp32), (true, MatMulOutput.Fp32), (false, MatMulOutput.AddFp32), (true, MatMulOutput.AddFp32),
            (false, MatMulOutput.Stored),
        })
        {
            byte[] all = setup.Multiply(Most, kind, bias), again = setup.Multiply(Most, kind, bias);
            Assert.Equal(all, again);
            foreach (int rows in new[] { 1, 2, 7, 8, 9, 64, 65, 255, 256, 257, 300, 301, 512, 513, 1025 })
            {
                Assert.True(
                    all.AsSpan(0, all.Length / Most * rows).SequenceEqual(setup.Multiply(rows, kind, bias)),
                    $"{rows} rows, {kind}, bias {bias}");
            }
        }
    }

    [Fact]
    public void What_is_stored_is_the_sum_rounded_once()
    {
        SimulatedDevice.RequireSimulated();
        using Setup setup = new(_folder, "up; down");
        float[] sums = MemoryMarshal.Cast<byte, float>(setup.Multiply(65, MatMulOutput.Fp32)).ToArray();
        ushort[] stored = MemoryMarshal.Cast<byte, ushort>(setup.Multiply(65, MatMulOutput.Stored)).ToArray();
        Assert.Equal(sums.Select(Rounded), stored);

        using Setup fp32 = new(_folder, "up; down", storesFp32: true);
        Assert.Equal(fp32.Multiply(65, MatMulOutput.Fp32), fp32.Multiply(65, MatMulOutput.Stored));
        _ = fp32.Multiply(65, MatMulOutput.Stored, bias: true);
        ArgumentException error = Assert.Throws<ArgumentException>(() => setup.Multiply(65, MatMulOutput.Stored, bias: true));
        Assert.Equal("An output in bf16 takes no bias. (Parameter 'bias')", error.Message);
    }

    [Fact]
    public void Matrices_that_are_not_aligned_are_refused()
    {
        SimulatedDevice.RequireSimulated();
        using Setup setup = new(_folder, "up");
        Assert.Throws<ArgumentException>(() => setup.Multiply(2, MatMulOutput.Fp32, shift: 16));
    }

    // ---- Failing algorithms are skipped.

    [Theory]
    [InlineData("halves fails=run; up; down fails=check")] // C4
    [InlineData("halves fails=check; halves fails=run; up")]
    [InlineData("halves workspace=40000000; up")]
    [InlineData("up; supported above=64")]
    public void Candidates_that_fail_and_row_counts_without_any_are_skipped(string candidates)
    {
        SimulatedDevice.RequireSimulated();
        Assert.Equal(Bits("up"), Bits(candidates));
    }

    [Theory]
    [InlineData("up fails=run; down fails=run", "2 x did not run (CUBLAS_STATUS_INTERNAL_ERROR).")]
    [InlineData("up above=300; down fails=run; supported above=256", "1 x nothing proposed for 512 rows (CUBLAS_STATUS_NOT_SUPPORTED); "
        + "1 x did not run (CUBLAS_STATUS_INTERNAL_ERROR); "
        + "1 x serves some row counts, but no algorithm with the same bits serves the others.")]
    [InlineData("up every=5; down most=64", "1 x the bits of a row depend on its place; "
        + "1 x serves some row counts, but no algorithm with the same bits serves the others.")]
    public void When_nothing_is_left_the_error_says_why(string candidates, string why)
    {
        SimulatedDevice.RequireSimulated();
        Assert.Equal($"None of 2 cuBLASLt algorithms for a matmul of [24, 72] serves all row counts on simulated device: {why}",
            Assert.Throws<CudaException>(() => Bits(candidates)).Message);
    }

    // ---- What is kept on disk.

    [Fact]
    public void A_start_with_a_full_cache_has_the_bits_of_one_with_an_empty_cache()
    {
        SimulatedDevice.RequireSimulated();
        string empty = Bits("up time=9; down time=1", _folder);
        string file = Assert.Single(Directory.GetFiles(_folder)), text = File.ReadAllText(file);
        Assert.Equal(empty, Bits("up time=1; down time=9", _folder));
        Assert.Equal(text, File.ReadAllText(file));
        Assert.Equal(Bits("up"), empty);
    }

    [Fact]
    public void A_choice_is_kept_and_not_made_again()
    {
        SimulatedDevice.RequireSimulated();
        long first = Launches(), second = Launches();
        Assert.InRange(second, 1, first / 10);

        long Launches()
        {
            SimulatedDevice.Counters before = SimulatedDevice.Count();
            _ = Bits("up time=9; up time=1", _folder);
            return (SimulatedDevice.Count() - before).Launches;
        }
    }

    public static TheoryData<string> Damages =>
        ["empty", "half", "a digit", "another word", "not hexadecimal", "not text", "another version's"];

    [Theory, MemberData(nameof(Damages))]
    public void A_damaged_cache_changes_no_bit_and_is_mended(string damage)
    {
        SimulatedDevice.RequireSimulated();
        string expected = Bits("up; down", _folder);
        string file = Assert.Single(Directory.GetFiles(_folder)), text = File.ReadAllText(file);
        string[] words = text.Split(' ');
        byte[] damaged = damage switch
        {
            "empty" => [],
            "half" => System.Text.Encoding.ASCII.GetBytes(text[..(text.Length / 2)]),
            "a digit" => System.Text.Encoding.ASCII.GetBytes(text[..80] + (text[80] == '1' ? '2' : '1') + text[81..]),
            "another word" => System.Text.Encoding.ASCII.GetBytes(text + " 00"),
            "not hexadecimal" => System.Text.Encoding.ASCII.GetBytes(text[..70] + "xyz" + text[73..]),
            "not text" => [0xFF, 0xFE, 0x00, 0x01],
            _ => System.Text.Encoding.ASCII.GetBytes($"{Outputs} {Inputs} {words[1]}\n"), // a line of the first version
        };
        File.WriteAllBytes(file, damaged);
        Assert.Equal(expected, Bits("up; down", _folder));
        Assert.Equal(text, File.ReadAllText(Assert.Single(Directory.GetFiles(_folder))));
    }

    /// <summary>Undamaged files whose algorithm does not do what the file says.</summary>
    [Theory]
    [InlineData("down")]            // other bits
    [InlineData("up fails=run")]
    [InlineData("up fails=check")]
    [InlineData("up above=200")]    // other bits above a number of rows
    [InlineData("up every=5")]
    public void A_kept_choice_that_does_not_hold_is_made_again(string other)
    {
        SimulatedDevice.RequireSimulated();
        string expected = Bits("up", _folder);
        string file = Assert.Single(Directory.GetFiles(_folder)), text = File.ReadAllText(file);
        string algorithm;
        using (Setup setup = new(_folder, other))
            algorithm = setup.MatMul.Survey(Outputs, Inputs, MatMulOutput.Fp32, [1])[0].Algorithm;
        string replaced = string.Join(' ', text.Split(' ')[..^1].Select((word, i) => i == 0 ? word : algorithm));
        File.WriteAllText(file, $"{replaced} {Convert.ToHexStringLower(System.Security.Cryptography.SHA256.HashData(
            System.Text.Encoding.ASCII.GetBytes(replaced)))[..32]}");
        Assert.Equal(expected, Bits("up; down", _folder));
        Assert.Equal(text, File.ReadAllText(file));
    }

    /// <summary>The file of another device, library or type of output, or of a shape with as many elements, is not used.</summary>
    [Fact]
    public void A_choice_is_found_by_its_own_device_and_shape_alone()
    {
        MatMulFile file = new(_folder, "one device"), other = new(_folder, "another device");
        cublasLtMatmulAlgo[] algorithms = new cublasLtMatmulAlgo[MatMulTuner.Buckets.Length + 1];
        for (int i = 0; i < algorithms.Length; i++)
            MemoryMarshal.AsBytes(algorithms.AsSpan(i, 1)).Fill((byte)(i + 1));
        MatMulChoice choice = new([1, 2, 3], algorithms);
        file.Write(24, 72, choice);
        Assert.All(
            (MatMulChoice?[])[other.Read(24, 72), file.Read(72, 24), file.Read(24, 73), file.Read(25, 72), file.Read(2, 472)],
            Assert.Null);
        MatMulChoice read = file.Read(24, 72)!;
        Assert.Equal(choice.Digest, read.Digest);
        Assert.Equal(choice.Algorithms.Select(MatMulTuner.Text), read.Algorithms.Select(MatMulTuner.Text));
        Assert.Equal([0, 0, 1, 1, 2, 2, 3], ((int[])[1, 8, 9, 64, 65, 512, 513]).Select(MatMulTuner.BucketOf));
    }

    [Fact]
    public void A_folder_that_cannot_be_written_costs_the_next_start_its_time_only()
    {
        SimulatedDevice.RequireSimulated();
        string file = Path.Combine(_folder, "file");
        File.WriteAllText(file, "");
        Assert.Equal(Bits("up"), Bits("up", Path.Combine(file, "below")));
    }

    [Fact]
    public async Task Processes_that_start_at_once_have_the_same_bits()
    {
        SimulatedDevice.RequireSimulated();
        string[] candidates = ["up time=9; down time=1", "up time=1; down time=9", "up time=5; up time=1; down time=1"];
        OtherProcess[] processes = [.. candidates.Select((proposed, i) => OtherProcess.Run($"{nameof(MatMulTests)}.{nameof(Multiplies)}",
            (FolderVariable, _folder), (CandidatesVariable, proposed), (ResultVariable, Path.Combine(_folder, $"bits-{i}"))))];
        foreach (OtherProcess process in processes)
        {
            await process.Succeeded();
            process.Dispose();
        }

        string[] bits = [.. Directory.GetFiles(_folder, "bits-*").Select(File.ReadAllText)];
        Assert.Equal(3, bits.Length);
        Assert.Equal(Bits("up"), Assert.Single(bits.Distinct()));
        Assert.Equal(bits[0], Bits("up; down", _folder)); // the file that they left
        Assert.Equal(4, Directory.GetFiles(_folder).Length);
    }

    [Fact(Explicit = true)]
    public void Multiplies()
    {
        SimulatedDevice.RequireSimulated();
        string bits = Bits("", Environment.GetEnvironmentVariable(FolderVariable)!);
        File.WriteAllText(Environment.GetEnvironmentVariable(ResultVariable)!, bits);
    }

    // ---- When it is chosen.

    /// <summary>A table of embeddings is a matrix that is never multiplied.</summary>
    [Fact]
    public void A_weight_that_is_not_multiplied_costs_no_choice()
    {
        SimulatedDevice.RequireSimulated();
        using IDisposable candidates = SimulatedDevice.Propose("up fails=run");
        using CudaBackend backend = new();
        using Weight table = backend.AllocateWeight(640, 32);
    }

    /// <summary>In a rehearsal, which is captured, the choice is made before.</summary>
    [Fact]
    public void The_first_matmul_of_a_shape_may_be_one_that_is_captured()
    {
        SimulatedDevice.RequireSimulated();
        string cache = Path.Combine(Environment.GetEnvironmentVariable("XDG_CACHE_HOME")!, "rollout");
        using CudaBackend backend = new();
        Bench bench = new(backend);
        for (int inputs = 801; inputs <= 803; inputs++)
        {
            Weight table = bench.Weight(8, inputs), weight = bench.Weight(9, inputs);
            Tensor input = backend.AllocateTensor(1, inputs), output = backend.AllocateTensor(1, 9);
            string[] before = Directory.GetFiles(cache);
            StepLayout step = Bench.Step(1, 1, _ => (0, 1), (_, _) => 0);
            (step.OutputCount, step.QueryCount, step.OutputRows[0], step.Queries[0]) = (1, 1, 0, Bench.Query(0));
            Run(step, multiply: false); // allocates memory
            backend.FinishStep(step);
            foreach (StepLayout rehearsal in backend.Rehearsals(step))
                Run(rehearsal);
            long graphs = backend.GraphLaunches;
            Run(step);
            backend.FinishStep(step);
            Assert.Equal(1, backend.GraphLaunches - graphs);
            foreach (string chosen in Directory.GetFiles(cache).Except(before))
                File.Delete(chosen);

            void Run(StepLayout run, bool multiply = true)
            {
                backend.BeginStep(run);
                backend.Embed(table, input);
                if (multiply)
                    backend.MatMul(input, weight, null, output, 1);
                backend.Sample(output, 0, 1);
            }
        }
    }

    // ---- The survey.

    [Fact]
    public void A_survey_shows_classes_failures_and_times()
    {
        SimulatedDevice.RequireSimulated();
        using Setup setup = new(_folder, "up time=1000; down above=100 time=10 from=8; up time=2000 workspace=64; halves fails=run");
        IReadOnlyList<MatMulCandidate> survey = setup.MatMul.Survey(Outputs, Inputs, MatMulOutput.Fp32, [1, 64, 300]);
        Assert.Equal(4, survey.Count);
        Assert.Empty(Directory.GetFiles(_folder));
        MatMulCandidate up = survey[0], slow = survey[1], failing = survey[2], down = survey[3];
        Assert.Equal([1, 64, 300], up.Rows.Select(at => at.Rows));
        Assert.Equal(up.Rows.SelectMany(Digests), slow.Rows.SelectMany(Digests));
        Assert.NotEqual(up.Rows[1].Digest, down.Rows[1].Digest);
        Assert.Equal(up.Rows[2].Digest, down.Rows[2].Digest); // above 100 rows it sums like the others
        Assert.Equal(3, Digests(up.Rows[1]).Distinct().Count());
        Assert.Equal([true, true, true], up.Rows.Select(at => at.KeepsRows));
        Assert.Equal([true, true, false], down.Rows.Select(at => at.KeepsRows));
        Assert.Equal([0, 0, 0], up.Rows.Select(at => at.Rank));
        Assert.Equal([-1, 1, 1], down.Rows.Select(at => at.Rank));
        Assert.Equal(64 * 1000e-9, up.Rows[1].Seconds, 1e-9);
        Assert.Equal(64 * 2000e-9, slow.Rows[1].Seconds, 1e-9);
        Assert.Equal((0, 64), (up.WorkspaceBytes, slow.WorkspaceBytes));
        Assert.All(failing.Rows, at => Assert.Equal("CUBLAS_STATUS_INTERNAL_ERROR", at.Failure));
        Assert.Equal("id 0, tile 0, stages 0, split-k 1, reduction 0, swizzle 0, custom 0, inner 0, cluster 0", up.Settings);
        Assert.Equal(128, up.Algorithm.Length);

        static string[] Digests(MatMulCandidateRows at) => [at.Digest, at.BiasDigest, at.AddDigest];
    }

    // ---- Running.

    /// <summary>The bits of a matmul with these candidates, chosen anew or read from the folder.</summary>
    private static string Bits(string candidates, string? folder = null)
    {
        string own = folder ?? Directory.CreateTempSubdirectory("rollout-matmul-").FullName;
        try
        {
            using Setup setup = new(own, candidates);
            return Convert.ToHexString(setup.Multiply(40, MatMulOutput.Fp32));
        }
        finally
        {
            if (folder is null)
                Directory.Delete(own, recursive: true);
        }
    }

    private static ushort Rounded(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return (ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }

    /// <summary>A device, and matmuls of one weight with random numbers of many magnitudes.</summary>
    private sealed class Setup : IDisposable
    {
        private const int MostRows = 1200;

        private readonly IDisposable _candidates;
        private readonly CudaDevice _device;
        private readonly CudaKernels _kernels;
        private readonly DeviceBuffer _input, _weight, _bias, _before, _output;
        private readonly int _storedBytes;

        public Setup(string folder, string candidates, bool storesFp32 = false)
        {
            SimulatedDevice.Require();
            _candidates = SimulatedDevice.Propose(candidates);
            _device = new CudaDevice(0);
            _kernels = new CudaKernels(_device, storesFp32);
            _storedBytes = storesFp32 ? sizeof(float) : sizeof(ushort);
            MatMul = new CudaMatMul(_device, _kernels, storesFp32, folder);
            Random random = new(5);
            _input = Filled(MostRows * Inputs, _storedBytes);
            _weight = Filled(Outputs * Inputs, _storedBytes);
            _bias = Filled(Outputs, sizeof(float));
            _before = Filled(MostRows * Outputs, sizeof(float));
            _output = _device.Allocate((MostRows * Outputs * sizeof(float)) + 256);

            DeviceBuffer Filled(int count, int bytes)
            {
                DeviceBuffer buffer = _device.Allocate(count * bytes);
                byte[] values = new byte[count * bytes];
                for (int i = 0; i < count; i++)
                {
                    uint bits = BitConverter.SingleToUInt32Bits((random.NextSingle() - 0.5f) * MathF.Pow(2, random.Next(-6, 7)));
                    if (bytes == sizeof(float))
                        BitConverter.TryWriteBytes(values.AsSpan(i * bytes), bits);
                    else
                        BitConverter.TryWriteBytes(values.AsSpan(i * bytes), (ushort)(bits >> 16));
                }

                _device.Upload(buffer.Pointer, values);
                return buffer;
            }
        }

        public CudaMatMul MatMul { get; }

        public byte[] Multiply(int rows, MatMulOutput kind, bool bias = false, int shift = 0)
        {
            int outputBytes = kind == MatMulOutput.Stored ? _storedBytes : sizeof(float);
            byte[] values = new byte[rows * Outputs * outputBytes];
            _device.Download(_before.Pointer, values);
            _device.Upload(_output.Pointer, values);
            MatMul.Multiply(
                _input.Pointer, _weight.Pointer, bias ? _bias.Pointer : 0, _output.Pointer + (nuint)shift, rows, Outputs, Inputs, kind);
            _device.Download(_output.Pointer, values);
            return values;
        }

        public void Dispose()
        {
            _candidates.Dispose();
            foreach (DeviceBuffer buffer in (DeviceBuffer[])[_input, _weight, _bias, _before, _output])
                buffer.Dispose();
            MatMul.Dispose();
            _kernels.Dispose();
            _device.Dispose();
        }
    }
}

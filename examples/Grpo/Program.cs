using System.Diagnostics;
using Rollout.Client.Torch;
using Rollout.Examples.Grpo;
using TorchSharp;

Stopwatch clock = Stopwatch.StartNew();
(Options? options, int exitCode) = Options.Parse(args);
if (options is null)
    return exitCode;

TorchNative.EnsureLoaded();
torch.set_num_threads(options.Threads);
torch.manual_seed(options.Seed);
Report report = new(options);
ArithmeticTask task = new(options.Seed);

// A small Qwen3, trained on just enough right answers to be right sometimes: GRPO learns from the difference.
// It trains on a GPU if built with -p:Torch=cuda and one is available.
torch.Device device = torch.cuda.is_available() ? torch.CUDA : torch.CPU;
using Policy policy = new(new PolicyConfig { VocabSize = ArithmeticTask.VocabSize }, device);
using MasterWeights weights = new(policy);
long size = policy.parameters().Sum(p => p.numel());
report.Line($"seed {options.Seed}: a Qwen3 of {size:n0} parameters, {task.HeldOut.Count} problems held out");
(int warmSteps, double expected) = WarmStart.Run(policy, weights, task);
report.WarmStart(warmSteps, expected, clock.Elapsed);
using Policy reference = policy.Freeze();

string folder = Path.Combine(options.Out, "model");
HuggingFaceFolder.Write(folder, policy);
await using Rollouts rollouts = await Rollouts.StartAsync(folder, options.Threads, options.Device);
Grpo grpo = new(policy, reference, weights);
report.HeldOut(0, await AccuracyAsync(task.HeldOut));

for (int step = 1; step <= options.Steps && clock.Elapsed.TotalMinutes < options.Minutes && report.RecentReward < options.Target; step++)
{
    Problem[] problems = task.NextTraining(options.Prompts);

    TimeSpan started = clock.Elapsed;
    IReadOnlyList<RolloutGroup> groups = await rollouts.SampleAsync(
        [.. problems.Select(p => p.Tokens)], options.Samples, ArithmeticTask.MaxAnswerTokens, temperature: 1, seed: SampleSeed(step));
    TimeSpan sampled = clock.Elapsed;
    if (groups.Any(g => g.Samples.Any(s => s.Version != (ulong)step - 1)))
        throw new InvalidOperationException($"step {step} was sampled from weights other than version {step - 1}");

    double[][] rewards = groups.Zip(problems, (g, p) => g.Samples.Select(s => ArithmeticTask.Reward(p, s.Tokens)).ToArray()).ToArray();
    GrpoStats stats = grpo.Step(groups, rewards);
    TimeSpan trained = clock.Elapsed;

    await rollouts.PushAsync(policy, version: (ulong)step);
    TimeSpan pushed = clock.Elapsed;

    report.Step(new(step, rewards.Average(r => r.Average()), stats, groups.Sum(g => g.Samples.Sum(s => (long)s.Tokens.Length)),
        sampled - started, trained - sampled, pushed - trained, pushed));
    if (step % 20 == 0)
        report.HeldOut(step, await AccuracyAsync([.. task.HeldOut.Take(200)]));
}

report.HeldOut(report.StepsTaken, await AccuracyAsync(task.HeldOut));
report.Finish(clock.Elapsed);
report.Plot(Path.Combine(options.Out, "learning-curve.png"));
return 0;

// First seed of a step's groups: no two groups, of any steps and seeds, draw the same noise.
ulong SampleSeed(int step) => ((ulong)(uint)options.Seed << 40) | ((ulong)step << 16);

async Task<double> AccuracyAsync(IReadOnlyList<Problem> problems)
{
    IReadOnlyList<RolloutGroup> groups = await rollouts.SampleAsync(
        [.. problems.Select(p => p.Tokens)], n: 1, ArithmeticTask.MaxAnswerTokens, temperature: 0, seed: 0);
    return groups.Zip(problems, (g, p) => ArithmeticTask.Reward(p, g.Samples[0].Tokens)).Average();
}
